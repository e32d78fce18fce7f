#!/bin/sh
# In ssh's place: runs mpirun's command on a host that is a network namespace (hosts.py).
#   agent.sh HOST COMMAND...
host=$1
shift
CERTKV_NODE=$host
TMPDIR=$CERTKV_HOSTS_TMP/$host
export CERTKV_NODE TMPDIR
exec ip netns exec "$host" /bin/sh -c "$*"
