# What belongs to the cluster, not to a recipe. Copy it to launch/site.sh: every launcher reads that inside its job, `stages submit` before it calls
# sbatch. Calling sbatch or srun by hand, source it first (`. launch/site.sh`): sbatch reads SBATCH_ACCOUNT and SBATCH_PARTITION, srun the SLURM_ ones.
# shellcheck shell=bash disable=SC2034

# export SBATCH_ACCOUNT=radiology SLURM_ACCOUNT=radiology SBATCH_PARTITION=h100 SLURM_PARTITION=h100

# Either a container, through pyxis ...
# export INFIMED_CONTAINER=/shared/images/infimed.sqsh
# export INFIMED_MOUNTS=/shared/project:/shared/project,/shared/data:/shared/data # with the project's folder under the same path
# ... or an environment that all nodes see:
# . /shared/project/.venv/bin/activate

# The network: which interface rank 0 is reached by, and which cards carry NCCL. Wrong ones are the usual cause of a job that hangs at its start.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3
# export MASTER_ADDR=... # where SLURM's own address of the first node is not reachable from the others

# export INFIMED_MIN_GBPS=100 # bus bandwidth below which preflight takes two nodes out
# export INFIMED_SRUN="--mpi=pmix"
