"""A twistd application: the supervisor with stand-in children. STAND_IN holds the settings as msgpack in hexadecimal."""

import os

from twisted.application.service import Application

from realtime.config import settings
from realtime.tap import make_service

application = Application("stand-in")
make_service(
    settings.load(bytes.fromhex(os.environ["STAND_IN"])), worker="stand_in", broker="stand_in"
).setServiceParent(application)
