#!/bin/sh
# install.sh LOCK: puts a lock file's packages and our wheel into /opt/metaserve, as it is to be served.
set -eu
python3 -m venv --without-pip /opt/metaserve
/build/bin/pip --python /opt/metaserve/bin/python3 install --quiet --require-hashes --no-deps -r "$1"
/build/bin/pip --python /opt/metaserve/bin/python3 install --quiet --no-deps --no-index /wheel/*.whl
# Compiled here once: a read-only root could never keep it. Hash-based: no time stamp to compare with.
/opt/metaserve/bin/python3 -m compileall -q --invalidation-mode unchecked-hash /opt/metaserve/lib || true
/opt/metaserve/bin/python3 -c "import app.cli, models.package"
