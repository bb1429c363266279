"""The tables that hold the truth of a study: tickets and epoch reports."""
