"""What the switchover will cost, with a bound: pure functions of measurements and of what past records taught."""
