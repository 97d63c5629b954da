"""What pages are told of a run, and when a run is another one."""

from learned_rounding.tests.nodes.probing import in_process


def test_pages_are_told_of_an_error_without_the_servers_folders(host, tmp_path):
    found = in_process(host, tmp_path, "progress_stopped")
    assert found["sent"] == found["wanted"]
    assert found["kept"] == found["wanted"][-1:]  # of the latest run of the node


def test_messages_of_a_node_that_one_prompt_executes_twice_are_one_run(host, tmp_path):
    assert in_process(host, tmp_path, "progress_twice") == {
        "sent": [0, 1, 2, 3, 0, 1],
        "kept": [["third", 0], ["third", 1]],
        "empty": [],
    }


def test_a_shard_that_changes_makes_another_source(host, tmp_path):
    found = in_process(host, tmp_path, "progress_shards")
    assert found["same"] and found["state changed"] and found["result changed"]
    assert found["without a shard"] == 2  # the index alone: who opens it says what is wrong
