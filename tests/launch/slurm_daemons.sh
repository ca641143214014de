#!/usr/bin/env bash
# A Slurm of two nodes on this host, in folder $1, until standard input closes: so it ends
# with the test that started it, also when that is killed. Prints "ready".
set -u
cd "$1" || exit
export SLURM_CONF=$1/slurm.conf
host=$(hostname -s)
mkdir -p munge state "spool/$host" spool/node2 run log
chmod 755 . munge
dd if=/dev/urandom of=munge/key bs=1024 count=1 2>/dev/null
chmod 400 munge/key
cat >slurm.conf <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$2
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$1/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool/%n
SlurmctldPidFile=$1/run/slurmctld.pid
SlurmdPidFile=$1/run/slurmd.%n.pid
SlurmctldLogFile=$1/log/slurmctld.log
SlurmdLogFile=$1/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
MaxArraySize=101
NodeName=$host NodeHostname=$host NodeAddr=127.0.0.1 Port=$3 CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$4 CPUs=2 RealMemory=8000 Weight=9 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
munged -F --key-file munge/key --socket munge/socket --pid-file munge/pid \
  --log-file munge/log --seed-file munge/seed >/dev/null 2>&1 &
pids=($!)
for _ in $(seq 50); do
  [ ! -S munge/socket ] || break
  sleep 0.1
done
slurmctld -D >/dev/null 2>&1 &
pids+=($!)
for node in "$host" node2; do
  slurmd -D -N "$node" >/dev/null 2>&1 &
  pids+=($!)
done
for _ in $(seq 150); do
  if [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ]; then
    echo ready
    break
  fi
  sleep 0.2
done
exec >/dev/null
cat >/dev/null
scancel --user=root
# A step's daemon ends only when it has told the controller that the step did.
for _ in $(seq 75); do
  [ -n "$(squeue -h 2>/dev/null)" ] || break
  sleep 0.2
done
kill "${pids[@]}"
wait
