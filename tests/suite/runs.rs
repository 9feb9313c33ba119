//! Runs as folders: what is in them, that nothing is lost when one dies, and what is said when something fails.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rand::RngExt;
use serde_json::Value;

use super::cli::Room;
use gemmnet::random::{Purpose, stream};

const NET: &str = "conv4-relu-pool-affine10";

fn history(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("history.jsonl")).unwrap_or_default();
    // The last line may be being written.
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The history without what differs from run to run.
fn course(run: &Path) -> Vec<Value> {
    let mut lines = history(run);
    lines.retain(|line| line["event"] != "start");
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        line.retain(|key, _| !["seconds", "images_per_second", "profile"].contains(&key.as_str()));
    }
    lines
}

fn newest_checkpoint(run: &Path) -> Vec<u8> {
    let step = |path: &Path| path.file_stem()?.to_str()?.strip_prefix("step-")?.parse::<usize>().ok();
    let paths = fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().path());
    fs::read(paths.max_by_key(|path| step(path)).unwrap()).unwrap()
}

fn start(room: &Room, args: &str) -> Child {
    room.std_command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until a run's history has so many measured epochs, or its program has ended.
fn await_epochs(run: &Path, child: &mut Child, epochs: usize) {
    let begin = Instant::now();
    loop {
        let measured = history(run).iter().filter(|line| line["event"] == "epoch").count();
        if measured >= epochs || child.try_wait().unwrap().is_some() {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(100), "{measured} of {epochs} epochs");
        sleep(Duration::from_millis(1));
    }
}

/// Whether two runs came to the same, to the bit.
#[track_caller]
fn same(room: &Room, one: &str, other: &str) {
    let [one, other] = [one, other].map(|run| room.path(run));
    assert_eq!(course(&one), course(&other));
    assert!(newest_checkpoint(&one) == newest_checkpoint(&other), "the checkpoints differ");
    let [a, b] = [&one, &other].map(|run| fs::read(run.join("model.safetensors")).unwrap());
    assert!(a == b, "the networks differ");
}

#[test]
fn fifty_kills_change_nothing() {
    let room = Room::new();
    let train = format!(
        "train --data-dir pics --net {NET} --batch-size 20 --optimizer adam --ema 0.9 --flip --shift 2 --epochs 240 --quiet"
    );
    room.run(&format!("{train} --run whole")).succeeds();
    let mut rng = stream(1, Purpose::Example, 0, 0);
    let run = room.path("killed");
    let mut kills = 0;
    while kills < 50 {
        let resumed = fs::read_dir(run.join("checkpoints")).is_ok_and(|mut files| files.next().is_some());
        if !resumed && run.exists() {
            // It died before its first checkpoint.
            fs::remove_dir_all(&run).unwrap();
        }
        let mut child = start(
            &room,
            &if resumed { "train --resume killed --quiet".into() } else { format!("{train} --run killed") },
        );
        let before = history(&run).iter().filter(|line| line["event"] == "epoch").count();
        await_epochs(&run, &mut child, before + rng.random_range(0..4));
        sleep(Duration::from_micros(rng.random_range(0..12_000)));
        assert!(child.try_wait().unwrap().is_none(), "it ended after {kills} kills: give it more epochs");
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
    }
    room.run("train --resume killed --quiet").succeeds();
    same(&room, "whole", "killed");
    assert_eq!(fs::read_dir(run.join("checkpoints")).unwrap().count(), 2, "nothing else is left");
}

#[test]
fn a_damaged_checkpoint_leaves_the_one_before() {
    let room = Room::new();
    let train = format!("train --data-dir pics --net {NET} --batch-size 20 --quiet");
    room.run(&format!("{train} --epochs 3 --run whole")).succeeds();
    room.run(&format!("{train} --epochs 2 --run cut")).succeeds();
    let whole = history(&room.path("whole"));
    let measured = whole.iter().filter(|line| line["event"] == "epoch");
    let steps: Vec<u64> = measured.map(|line| line["step"].as_u64().unwrap()).collect();
    // the first is from before the first epoch
    let (first, second) = (steps[1], steps[2]);
    let path = room.path(&format!("cut/checkpoints/step-{second}.safetensors"));
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let resume = "train --resume cut --epochs 3 --quiet";
    let advice = format!("or remove this file, to go on from iteration {first}");
    room.run(resume).fails(1, &[&format!("step-{second}.safetensors: "), "cut off", &advice]);
    fs::remove_file(&path).unwrap();
    room.run(resume).succeeds();
    same(&room, "whole", "cut");
}

/// 2 epochs at once, and 1, killed, and the other.
fn killed_once(room: &Room, name: &str, options: &str) {
    let train = format!("train --data-dir pics --epochs 3 --quiet {options}");
    room.run(&format!("{train} --run {name}-whole")).succeeds();
    let run = room.path(&format!("{name}-killed"));
    let mut child = start(room, &format!("{train} --run {name}-killed"));
    // The second epoch's line: the first epoch's checkpoint is there by then.
    await_epochs(&run, &mut child, 3);
    child.kill().unwrap();
    child.wait().unwrap();
    room.run(&format!("train --resume {name}-killed --quiet")).succeeds();
    same(room, &format!("{name}-whole"), &format!("{name}-killed"));
}

#[test]
fn every_preset_goes_on_after_a_kill() {
    let room = Room::new();
    let presets = room.json("train --list-presets");
    for preset in presets["presets"].as_array().unwrap() {
        let name = preset["name"].as_str().unwrap();
        // Whitening is LAPACK's work.
        if !cfg!(feature = "blas") && preset["arguments"].as_str().unwrap().contains("whiten") {
            continue;
        }
        killed_once(&room, name, &format!("--preset {name} --train-limit 40 --batch-size 20"));
    }
}

#[test]
fn every_rule_goes_on_after_a_kill() {
    let room = Room::new();
    for rule in ["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw"] {
        killed_once(&room, rule, &format!("--net {NET} --batch-size 20 --optimizer {rule} --learning-rate 1e-3"));
    }
    killed_once(
        &room,
        "muon",
        &format!("--net {NET} --batch-size 20 --group weight=muon,lr=0.01 --clip-norm 1 --dtype f64"),
    );
}

/// With a whitening layer, which is LAPACK's work.
#[cfg(feature = "blas")]
#[test]
fn a_config_repeats_its_run() {
    let room = Room::new();
    let options = "--preset record --net whiten2-gelu-conv8b0-pool-bn0.6g0-gelu-affine10b0-div8-softmax0.2sum --epochs 1.5 \
                   --batch-size 20 --learning-rate 0.1 --seed 18446744073709551615 --train-limit 60 --run first";
    room.run(&format!("train --data-dir pics --quiet {options}")).succeeds();
    room.run("train --config first/config.toml --quiet --run second").succeeds();
    same(&room, "first", "second");
    let configs = ["first", "second"].map(|run| fs::read_to_string(room.path(run).join("config.toml")).unwrap());
    assert_eq!(configs[0], configs[1]);
    // What is said beside it changes it.
    let other = room.json("train --config first/config.toml --epochs 0.5 --seed 3 --run third");
    assert_eq!((&other["epochs"], &other["seed"]), (&0.5.into(), &3.into()));
    // Some keys are enough.
    fs::write(room.path("mine.toml"), format!("net = '{NET}'\nbatch-size = 20\nepochs = 1\nflip = 'random'\n"))
        .unwrap();
    let own = room.json("train --data-dir pics --config mine.toml");
    assert_eq!((&own["preset"], &own["steps"], &own["run"]), (&"three-layer-65".into(), &4.into(), &"runs/1".into()));
    fs::write(room.path("mine.toml"), "nett = 'conv'\n").unwrap();
    room.run("train --data-dir pics --config mine.toml")
        .fails(1, &["mine.toml", "line 1", "unknown field `nett`", "--help"]);
    let both = room.run("train --config mine.toml --resume first");
    assert!(both.code == Some(2) && both.stderr.contains("cannot be used with"), "{}", both.stderr);
}

/// The step, where it began, and where to go on.
#[test]
fn a_loss_that_is_no_number_is_explained() {
    let room = Room::new();
    let train = format!("train --data-dir pics --net {NET} --batch-size 20 --optimizer sgd --epochs 9");
    room.run(&format!("{train} --schedule step:2:1e38 --learning-rate 1e-5 --run wild --quiet")).fails(
        1,
        &[
            "the loss became",
            "at iteration",
            "not finite",
            "lower the learning rate",
            "the last good checkpoint is wild/checkpoints/step-8.safetensors",
            "gemmnet train --resume wild",
        ],
    );
    room.run("eval --checkpoint wild").succeeds();
    room.run("train --resume wild --schedule constant --quiet").succeeds();
    room.run(&format!("{train} --learning-rate 1e30 --run wilder --quiet"))
        .fails(1, &["not finite", "there is no checkpoint yet"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_loses_nothing() {
    let room = Room::new();
    let train = format!("train --data-dir pics --net {NET} --batch-size 20 --epochs 2 --quiet --run full");
    let limited = |args: &str| room.run_on_full_disk(args, 64);
    limited(&train).fails(1, &["cannot write full/", "MB of free space"]);
    fs::remove_dir_all(room.path("full")).unwrap();
    room.run(&train).succeeds();
    let before = newest_checkpoint(&room.path("full"));
    limited("train --resume full --epochs 4 --quiet")
        .fails(1, &["cannot write full/", "the last good checkpoint is full/checkpoints/step-8"]);
    assert!(newest_checkpoint(&room.path("full")) == before);
    room.run("train --resume full --epochs 4 --quiet").succeeds();
    // Nor can a folder be made where nobody may.
    room.run(&format!("train --data-dir pics --net {NET} --run /proc/run"))
        .fails(1, &["cannot create /proc/run", "--run"]);
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_that_shrinks_while_it_is_mapped_is_an_error() {
    let room = Room::new();
    let train = format!("train --data-dir pics --net {NET} --batch-size 20 --epochs 100000 --quiet --run run");
    let mut child = room.std_command(&train).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    await_epochs(&room.path("run"), &mut child, 3);
    for batch in 1..=5 {
        fs::File::options()
            .write(true)
            .open(room.path("pics").join(format!("data_batch_{batch}.bin")))
            .unwrap()
            .set_len(0)
            .unwrap();
    }
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let error = stderr.lines().last().unwrap();
    assert!(error.starts_with("error: a mapped data file became shorter"), "{stderr}");
    assert!(error.contains("after iteration") && error.ends_with("gemmnet train --resume run"), "{stderr}");
}

#[test]
fn two_programs_do_not_train_one_run() {
    let room = Room::new();
    let mut child = start(&room, &format!("train --data-dir pics --net {NET} --epochs 100000 --quiet --run run"));
    await_epochs(&room.path("run"), &mut child, 2);
    room.run("train --resume run").fails(1, &["run", "is being trained by another program"]);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn tune_finds_a_rate_and_survives_a_kill() {
    let room = Room::new();
    let vary = "--vary learning-rate=1e-6..1 --vary l2=0.0001,0.001 --vary batch-size=10,20 --vary width=0.5,1";
    let tune = format!("tune --data-dir pics --net {NET} --optimizer adam --epochs 9 --trials 9 {vary}");
    let whole = room.json(&format!("{tune} --run whole"));
    assert_eq!((&whole["trials"], &whole["run"]), (&9.into(), &"whole".into()));

    let mut child = start(&room, &format!("{tune} --run killed"));
    let begin = Instant::now();
    let results = |run: &str| fs::read_to_string(room.path(run).join("results.jsonl")).unwrap_or_default();
    while results("killed").lines().count() < 4 && child.try_wait().unwrap().is_none() {
        assert!(begin.elapsed() < Duration::from_secs(100));
        sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let resumed = room.json("tune --resume killed");
    for key in ["best", "accuracy", "values", "arguments"] {
        assert_eq!(resumed[key], whole[key], "{key}");
    }
    // 9 trials for a third of the epochs, 3 for all.
    assert_eq!(results("killed").lines().count(), 12);
    assert!(room.path("whole/best.toml").is_file());
    room.run("train --config whole/best.toml --quiet").succeeds();

    let goal =
        room.json(&format!("tune --data-dir pics --net {NET} --vary epochs=1,40 --trials 2 --target 0 --seeds 2"));
    assert_eq!(
        (&goal["run"], &goal["values"]["epochs"]),
        (&"tune/1".into(), &"1".into()),
        "the faster one reaches it too"
    );
    // A word in braces may be called as the option that it stands in.
    room.json("tune --data-dir pics --net conv{net}-gap-affine10 --epochs 1 --vary net=2 --trials 1");
    for (args, parts) in [
        ("--vary lerning-rate=1,2", &["--vary", "unknown field `lerning-rate`", "KEY is a long option"][..]),
        ("--vary batch-size", &["`batch-size` has no `=`", "KEY=LOW..HIGH"]),
        ("--vary l2=0..1", &["no range of numbers above 0"]),
        ("--vary epochs=1,2 --epochs 1", &["--vary", "`epochs=1,2` is also given", "leave one of the two out"]),
        ("--vary width=1 --vary batch-size", &["`batch-size` has no `=`"]),
        ("--trials 0", &["tune", "1 or more"]),
        ("--target 65", &["target", "0 to 1"]),
        ("--net conv{a}-affine10", &["network notation", "character 5"]),
    ] {
        room.run(&format!("tune --data-dir pics {args}")).fails(2, parts);
    }
    room.run("tune --resume pics").fails(1, &["pics/search.toml", "folder of a search"]);
}
