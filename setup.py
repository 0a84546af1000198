"""Metadata of the dsnet-orch distribution; tool settings live in pyproject.toml, tested versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="dsnet-orch",
    version="0.1.0",
    description="Train slimmable supernets, sweep input-adaptive gates, measure them and export what is Pareto-optimal.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
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
    install_requires=[
        "torch>=2.6",
        "ray[train,tune]>=2.51",
        "optuna>=4.6",
        "mlflow>=3.5",
        "pandas>=2.2",
        "plotly>=6.0",
        "click>=8.1",
        "numpy>=1.26",
        "pyarrow>=16",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "pillow>=10.2",
        "pydantic>=2.7",
        "ruamel.yaml>=0.18.6",
        "rich>=13.7",
        "moocore>=0.1.7",
    ],
    extras_require={
        "images": ["kaleido>=1.0"],
        "test": ["pytest>=8.0", "pytest-timeout>=2.3", "hypothesis>=6.100"],
        "check": ["ruff>=0.6", "mypy>=1.11", "import-linter>=2.1"],
    },
    entry_points={"console_scripts": ["dsnet-orch=orchestration.cli:main"]},
    classifiers=["Programming Language :: Python :: 3.11", "Operating System :: POSIX :: Linux"],
)
