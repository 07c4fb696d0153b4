#!/bin/sh
# On a worker: waits until the cloud says that this spot machine will be taken away (AWS: two minutes before), then tells
# Ray. Trials save their state at once and go on elsewhere. METADATA: the address of the machine's metadata service.
set -eu
METADATA=${METADATA:-http://169.254.169.254}
notice() {
    token=$(curl -fsS -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$METADATA/latest/api/token") &&
        curl -fs -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$METADATA/latest/meta-data/spot/instance-action"
}
until notice; do sleep 5; done
exec ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'spot notice' --deadline-remaining-seconds 110
