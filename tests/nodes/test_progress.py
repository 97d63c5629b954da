"""Messages to pages, and the identity of runs and sources."""

from learned_rounding.tests.nodes.probing import in_process


def test_error_messages_to_pages_contain_no_folders(host, tmp_path):
    found = in_process(host, tmp_path, "progress_stopped")
    assert found["sent"] == found["wanted"]
    assert found["kept"] == found["wanted"][-1:]  # stored: the latest run of the node


def test_two_executions_in_one_prompt_are_one_run(host, tmp_path):
    assert in_process(host, tmp_path, "progress_twice") == {
        "sent": [0, 1, 2, 3, 0, 1],
        "kept": [["third", 0], ["third", 1]],
        "empty": [],
    }


def test_changed_shard_changes_the_source(host, tmp_path):
    found = in_process(host, tmp_path, "progress_shards")
    assert found["same"] and found["state changed"] and found["result changed"]
    assert found["without a shard"] == 2  # the index only; the missing shard is reported when it is opened
