"""What everything stands on: clocks, errors, background tasks."""
