"""Prediction of the downtime and its bound: pure functions of measurements and of past records."""
