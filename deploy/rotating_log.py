"""Writes standard input to a file that stays small, for deploy/mlflow_server.sh: python deploy/rotating_log.py FILE

What is there becomes FILE.1, in the place of the one before, when it has grown to 10 MB.
"""

import logging
import sys
from logging.handlers import RotatingFileHandler

log = RotatingFileHandler(sys.argv[1], maxBytes=10_000_000, backupCount=1, encoding="utf-8")
# Whatever comes is taken: what is no text must not end the reader of a server that goes on writing.
with open(0, encoding="utf-8", errors="backslashreplace") as lines:
    for line in lines:
        log.emit(logging.makeLogRecord({"msg": line.rstrip("\n")}))
