"""The tasks. Each module has

data_sha256(task, settings) -> hash of all the data of the task, which it downloads if need be
build(run) -> a Workload of bench.evidence.training, seeded by run.seed

and "fisher", which compares no trainings, has execute(run) instead of build.
"""
