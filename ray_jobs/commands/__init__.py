"""The commands of `poise`, by what they are about; each calls one entry point of `ray_jobs`."""
