"""Find the fastest decisions for a workload by measuring: MetaSchedule's search, workers, and a log that survives."""
