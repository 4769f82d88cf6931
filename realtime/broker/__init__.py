"""The broker process: the embedded engine behind Unix streams."""
