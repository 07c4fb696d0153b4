#!/bin/sh
# MLflow beside the head, on localhost, with a login: sh deploy/mlflow_server.sh FOLDER
# FOLDER keeps the database and the artifacts; the environment (deploy/mlflow_env.py) has the password.
# It returns when the server answers. A second call while the server runs does nothing: after a change of the password,
# `fuser -k FOLDER/server.lock` first.
#
# Artifacts in a bucket instead: FOLDER/artifacts.env, mode 600, says where. The server alone reads it and passes all files
# on, so that drivers and browsers need no key of the bucket:
#     MLFLOW_ARTIFACTS_DESTINATION=s3://BUCKET/FOLDER
#     AWS_ACCESS_KEY_ID=...                # these two not where the machine has a role of its own
#     AWS_SECRET_ACCESS_KEY=...
#     MLFLOW_S3_ENDPOINT_URL=https://...   # of a store other than Amazon's: MinIO, Ceph
set -eu
folder=$1
here=$(cd "$(dirname "$0")" && pwd)
port=${MLFLOW_PORT:-5000}
: "${MLFLOW_AUTH_ADMIN_PASSWORD:?is not set: source the file that deploy/mlflow_env.py writes}"
# No jobs of MLflow's own: several more processes, which nothing here needs.
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
umask 077
mkdir -p "$folder"
cd "$folder" # where basic-auth keeps its users
folder=$(pwd)
if [ -f artifacts.env ]; then
    set -a
    . ./artifacts.env
    set +a
fi
# flock is held as long as the server lives: Ray may run its start commands more than once. One that was just killed
# holds it for a moment longer.
# --allowed-hosts: no other site's page can reach the server through somebody's browser (DNS rebinding).
# rotating_log.py: MLflow writes a line for every request, which would fill the disk in the end.
# mlflow_login.py: a password that changed since the login database was made is the one that counts.
nohup flock --timeout 10 server.lock sh -c 'python "$0" && exec mlflow server "$@"' "$here/mlflow_login.py" \
    --app-name basic-auth --host 127.0.0.1 --port "$port" --workers 1 \
    --allowed-hosts "localhost,localhost:$port,127.0.0.1,127.0.0.1:$port" \
    --backend-store-uri "sqlite:///$folder/mlflow.db" \
    --artifacts-destination "${MLFLOW_ARTIFACTS_DESTINATION:-$folder/artifacts}" \
    2>&1 | nohup python "$here/rotating_log.py" server.log > /dev/null 2>&1 &

# Whoever types a sweep right after `ray up` shall find the server.
mine=$!
seconds=0
until python -c "import urllib.request as web; web.urlopen('http://127.0.0.1:$port/health', timeout=5)" 2> /dev/null; do
    seconds=$((seconds + 1))
    if [ "$seconds" -gt 120 ] || { ! kill -0 "$mine" 2> /dev/null && flock --nonblock server.lock true; }; then
        echo "no MLflow server answers on 127.0.0.1:$port; the end of $folder/server.log:" >&2
        tail -n 20 server.log >&2
        exit 1
    fi
    sleep 1
done
