"""Questions asked of theory and network together; one file per question."""
