"""The Ray cluster that jobs run on."""

from typing import Any

from .extras import import_extra


def connect_to_ray() -> Any:
    """The package `ray`, connected to the cluster that this process is connected to already, that `RAY_ADDRESS` names,
    or a new one of this machine. Ray's own progress bars are off, and a failed block ends a job.

    Raises:
        ImportError: Ray is not installed.
    """
    ray = import_extra("ray", "ray")
    import_extra("ray.data", "ray")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="warning")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    return ray
