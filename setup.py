"""What pyproject.toml cannot say: the folder configs/ stands at the top of the repository, where
README names it, and inside the package `ray_jobs` once it is installed.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["operators*", "pipelines*", "ray_jobs*"]),
        "ray_jobs.configs",
    ],
    package_dir={"ray_jobs.configs": "configs"},
)
