"""Import the application that the configuration names."""

from __future__ import annotations

import importlib
import sys
import traceback

from realtime.app.application import App
from realtime.config.settings import AppSettings
from realtime.errors import ApplicationFailed, SettingsError


def load(settings: AppSettings) -> App:
    """Import and return the configured application; without a configured module, return an App without handlers.

    Puts `settings.path` first on `sys.path`. Raises SettingsError for a mistake in the code, such as a missing module
    or a syntax error, and ApplicationFailed for any other exception, such as that a database is not up yet.
    Both have one line that names the file and line at fault.
    """
    if not settings.module:
        return App()
    if settings.path and sys.path[0] != settings.path:
        sys.path.insert(0, settings.path)
    key = f'app.module = "{settings.module}"'
    module_name, _, attribute = settings.module.partition(":")
    try:
        module = importlib.import_module(module_name)
    except SettingsError:
        raise
    except (ImportError, SyntaxError) as error:
        raise SettingsError([f"{key}: {_import_problem(error, module_name, settings.path)}"]) from error
    except (Exception, SystemExit) as error:
        raise ApplicationFailed(f"{key}: {_import_problem(error, module_name, settings.path)}") from error
    found = getattr(module, attribute or "app", None)
    if not isinstance(found, App):
        problem = "is missing" if found is None else f"is of type {type(found).__name__}"
        raise SettingsError(
            [f"{key}: {module.__file__}: '{attribute or 'app'}' {problem}; define it as app = realtime.App()"]
        )
    found.options = dict(settings.options)
    return found


def _import_problem(error: BaseException, module: str, path: str) -> str:
    """Describe an error in the application's code in one line, with its file and line."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"there is no module {error.name!r} (app.path is {path!r})"
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    summary = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_source(frame.filename)]
    application_frames = [frame for frame in frames if path and frame.filename.startswith(path)] or frames
    if not application_frames:
        return summary
    return f"{application_frames[-1].filename}:{application_frames[-1].lineno}: {summary}"


def _is_source(filename: str) -> bool:
    return not filename.startswith("<") and filename not in (__file__, importlib.__file__)
