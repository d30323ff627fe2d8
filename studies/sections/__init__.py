"""Parts of a study's page: each module turns the study's material into one section, or None where it has nothing."""
