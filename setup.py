"""Metadata of the dsnet-orch distribution; tool settings live in pyproject.toml, tested versions in
constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "dsnet" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)
assert VERSION is not None

setup(
    name="dsnet-orch",
    version=VERSION[1],
    description="Train slimmable supernets, sweep input-adaptive gates, measure them and export what is Pareto-optimal.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    py_modules=["dsnet_orch"],
    packages=find_packages(
        include=[
            "dsnet",
            "dsnet.*",
            "search",
            "search.*",
            "orchestration",
            "orchestration.*",
            "dashboards",
            "dashboards.*",
        ]
    ),
    package_data={name: ["py.typed"] for name in ("dsnet", "search", "orchestration", "dashboards")},
    # Lower bounds are the versions that the test suite ran with: older ones are not known to work,
    # and Optuna 4 does not.
    install_requires=[
        "torch>=2.13",
        "ray[train,tune]>=2.60",
        "optuna>=5.0",
        "mlflow>=3.17",
        "pandas>=3.1",
        "plotly>=7.1",
        "matplotlib>=3.11",
        "click>=8.5",
        "numpy>=2.4",
        "jaxtyping>=0.3.11",
        "scipy>=1.17",
        "threadpoolctl>=3.6",
        "pyarrow>=25.0",
        "safetensors>=0.8",
        "scikit-learn>=1.9",
        "pillow>=13.0",
        "pydantic>=2.14",
        "annotated-types>=0.8",
        "ruamel.yaml>=0.19",
        "rich>=15.0",
        "moocore>=0.3",
    ],
    extras_require={
        "dashboard": ["optuna-dashboard>=0.20"],
        "deploy": ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32"],
        "openvino": ["openvino>=2026.4"],
        "images": ["kaleido>=1.5"],
        # Of the packages of ray[serve] those that Ray Serve itself needs: the others are for Ray's
        # dashboard, whose listeners would be started with every cluster.
        "serve": ["grpcio>=1.85", "grpcio-reflection>=1.85", "starlette>=1.0", "uvicorn>=0.54", "fastapi>=0.165"],
        "test": [
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "beartype>=0.23",
            "optuna-dashboard>=0.20",
        ],
        "check": ["ruff>=0.6", "mypy>=1.11", "import-linter>=2.1"],
    },
    entry_points={"console_scripts": ["dsnet-orch=dsnet_orch:main"]},
    classifiers=["Programming Language :: Python :: 3.11", "Operating System :: POSIX :: Linux"],
)
