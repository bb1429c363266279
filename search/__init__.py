"""The service: studies, tickets, workers, records and exports around `yolocore`."""
