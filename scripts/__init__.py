"""Programs of the project that are not installed: demonstration, measurement, documents."""
