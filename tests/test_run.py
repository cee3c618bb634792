from conftest import read_report

def test_main_job(fake, run):
    result = run()
    assert result.code == 0, result.err
    assert read_report(result.report) == fake.table()
