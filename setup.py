"""Build one package, `onesided`: the algorithm as `onesided.adapters`, the program in the folder `onesided/program`.

The program imports `app`, `datamodules` and `modules`, and recipes name classes of these packages. As top-level
packages in site-packages, these packages could collide with others. So `main.py` puts its own folder on the path.
"""

from setuptools import find_namespace_packages, setup

program = find_namespace_packages(include=["app*", "conf*", "datamodules*", "modules*"])
setup(
    script_name="setup.py",  # setuptools then does not package setup.py beside main.py
    packages=["onesided.adapters", "onesided.program", *(f"onesided.program.{name}" for name in program)],
    package_dir={"onesided.adapters": "modules/adapters", "onesided.program": "."},
    package_data={"": ["*.parquet", "*.safetensors", "*.sbatch", "*.toml", "*.txt", "*.yaml", "py.typed"]},
)
