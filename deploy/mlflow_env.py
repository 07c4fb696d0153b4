"""Prints the environment of the head's MLflow: of its server, and of the drivers that write to it.

    python deploy/mlflow_env.py ~/.ray/mlflow_password > ~/.ray/mlflow.env      # under umask 077

A session key is drawn anew each time; the password is the one in the file.
"""

import re
import secrets
import sys
from pathlib import Path


def environment(password: str) -> dict[str, str]:
    """What a server with basic-auth and its clients read; ValueError for a password that a shell might mangle."""
    if not re.fullmatch(r"[A-Za-z0-9._~-]{12,}", password):
        raise ValueError("expected a password of 12 or more letters, digits and ._~-, e.g. of `openssl rand -hex 16`")
    return {
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": password,
    }


if __name__ == "__main__":
    try:
        values = environment(Path(sys.argv[1]).expanduser().read_text().strip())
    except (IndexError, OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(sys.argv[1:])}: {error}")
    print("\n".join(f"{key}={value}" for key, value in values.items()))
