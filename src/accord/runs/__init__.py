"""A run's folder: atomic files, the lock, the environment, which stages are done, sealed checkpoints."""

from accord.runs.atomic import append_line, full_disk_told, read_lines, read_record, replace_folder, sync, write_atomic
from accord.runs.difference import OF_NO_RESULT
from accord.runs.environment import commit, peak_memory_bytes
from accord.runs.received import refuse_foreign
from accord.runs.run import Run, something_done, stage_of, stages_done, stages_planned

__all__ = [
    "OF_NO_RESULT",
    "Run",
    "append_line",
    "commit",
    "full_disk_told",
    "peak_memory_bytes",
    "read_lines",
    "read_record",
    "refuse_foreign",
    "replace_folder",
    "something_done",
    "stage_of",
    "stages_done",
    "stages_planned",
    "sync",
    "write_atomic",
]
