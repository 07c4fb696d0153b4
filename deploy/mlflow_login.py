"""Gives the admin of an existing login database the password that the environment has; mlflow_server.sh calls it.

MLflow takes that password when it makes the database, and never again: without this, a new `~/.ray/mlflow_password`
would lock its owner out. Run where basic_auth.db lies; where there is none yet, nothing happens.
"""

import os
from pathlib import Path

DATABASE = Path("basic_auth.db")  # MLflow's default

if __name__ == "__main__" and DATABASE.is_file():
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    name = os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME", "admin")  # MLflow's default as well
    password = os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]
    store = SqlAlchemyStore()
    store.init_db(f"sqlite:///{DATABASE}")
    if store.has_user(name) and not store.authenticate_user(name, password):
        store.update_user(name, password)
