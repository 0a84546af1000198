"""Entry point of `python -m dsnet.training`, which runs `dsnet.standalone`."""

if __name__ == "__main__":
    import runpy

    runpy.run_module("dsnet.standalone", run_name="__main__", alter_sys=True)
