#!/bin/sh
# A local cluster of 1 chief, 2 workers and 1 ps. Arguments go to the training program:
#   launch/local.sh --recipe=digits_cnn
# NUM_WORKERS, NUM_PS and STRATEGY change the cluster; without ps tasks: STRATEGY=multiworker launch/local.sh
set -eu
strategy=${STRATEGY:-ps}
case $strategy in ps) num_ps=${NUM_PS:-1} ;; *) num_ps=${NUM_PS:-0} ;; esac
exec "${PYTHON:-python3}" -m tfdist.launch --preload --strategy="$strategy" --num_workers="${NUM_WORKERS:-2}" \
    --num_ps="$num_ps" -m tfdist.train --strategy="$strategy" "$@"
