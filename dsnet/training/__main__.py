"""`python -m dsnet.training` runs `dsnet.standalone`, whose name it had before the standalone run got a folder of its own."""

if __name__ == "__main__":
    import runpy

    runpy.run_module("dsnet.standalone", run_name="__main__", alter_sys=True)
