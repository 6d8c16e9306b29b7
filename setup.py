"""Build one package, `onesided`: the algorithm as `onesided.adapters`, the program in the folder `onesided/program`.

The program imports `app`, `datamodules` and `modules`, and recipes name their classes. These names would be top-level
packages in site-packages, where others may have the same names. So `main.py` puts its own folder on the path instead.
"""

from setuptools import find_namespace_packages, setup

program = find_namespace_packages(include=["app*", "conf*", "datamodules*", "modules*"])
setup(
    script_name="setup.py",  # which is then left out of the folder of main.py
    packages=["onesided.adapters", "onesided.program", *(f"onesided.program.{name}" for name in program)],
    package_dir={"onesided.adapters": "modules/adapters", "onesided.program": "."},
    package_data={"": ["*.parquet", "*.safetensors", "*.sbatch", "*.yaml", "py.typed"]},
)
