def write_sweep_report(workdir, summary):
    pass
