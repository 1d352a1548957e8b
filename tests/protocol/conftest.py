"""Property tests of the pure protocol: the same examples on every run, and few enough for a slow shared machine."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "protocol", derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("protocol")
