//! The program as its user meets it: results, errors, exit codes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use assert_cmd::Command;
use gemmnet::data::cifar10::{RECORD, TEST_BATCH, TRAIN_BATCHES};
use gemmnet::data::pictures::{CLASS_NAMES, write_pictures};
use gemmnet::data::{Arrays, Dataset, Normalization};
use gemmnet::nn::init::Init;
use gemmnet::nn::network::Network;
use gemmnet::train::{Solver, SolverOptions};
use ndarray::Array4;
use serde_json::Value;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_gemmnet");
/// A network that trains in no time.
const NET: &str = "conv4-relu-pool-affine10";
/// An address where nobody answers.
const NOWHERE: &str = "http://127.0.0.1:9/cifar-10-binary.tar.gz";

/// A folder to work in, which is home too, so that nothing of the user's is found or changed. It holds `pics`: 100
/// training and 20 test pictures.
pub(crate) struct Room(TempDir);

impl Room {
    pub(crate) fn new() -> Self {
        let room = Room(tempfile::tempdir().unwrap());
        write_pictures(&room.path("pics"), 0, 20).unwrap();
        room
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn std_command(&self, args: &str) -> std::process::Command {
        let mut command = std::process::Command::new(PROGRAM);
        command.args(args.split_whitespace()).current_dir(self.0.path());
        command.env("HOME", self.0.path()).env("XDG_CACHE_HOME", self.path("cache"));
        command.env("GEMMNET_CIFAR10_URL", NOWHERE).env_remove("GEMMNET_DATA_DIR").env_remove("GEMMNET_NUM_THREADS");
        command.env_remove("GEMMNET_PROFILE");
        command
    }

    pub(crate) fn run(&self, args: &str) -> Done {
        self.done(args, self.std_command(args))
    }

    /// The same where no file may grow beyond so many kilobytes, which is what a full disk looks like.
    #[cfg(target_os = "linux")]
    pub(crate) fn run_on_full_disk(&self, args: &str, kilobytes: usize) -> Done {
        let program = self.std_command(args);
        let mut shell = std::process::Command::new("bash");
        // The signal that comes with the error is ignored, as on a disk that is full there is none.
        let limited = format!("trap '' XFSZ; ulimit -f {kilobytes}; exec \"$0\" \"$@\"");
        shell.args(["-c", &limited]).arg(program.get_program()).args(program.get_args());
        shell.current_dir(program.get_current_dir().unwrap());
        shell.envs(program.get_envs().filter_map(|(key, value)| Some((key, value?))));
        self.done(args, shell)
    }

    /// What `command`, which runs the program with these arguments, has done.
    pub(crate) fn done(&self, args: &str, command: std::process::Command) -> Done {
        let output = Command::from_std(command).timeout(Duration::from_secs(100)).output().unwrap();
        Done {
            args: args.to_owned(),
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// What a successful command prints with `--json`.
    pub(crate) fn json(&self, args: &str) -> Value {
        self.run(&format!("{args} --json")).succeeds().object()
    }

    /// A short training on the pictures.
    fn train(&self, args: &str) -> Value {
        self.json(&format!("train --data-dir pics --net {NET} --batch-size 20 --schedule constant {args}"))
    }
}

/// A command that has ended.
pub(crate) struct Done {
    args: String,
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    #[track_caller]
    pub(crate) fn succeeds(self) -> Self {
        assert_eq!(self.code, Some(0), "{}: {}", self.args, self.stderr);
        self
    }

    /// The same, had it printed no result.
    pub(crate) fn without_result(self) -> Self {
        Done { stdout: String::new(), ..self }
    }

    /// One object, and nothing else on stdout.
    #[track_caller]
    pub(crate) fn object(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "{}: {}", self.args, self.stdout);
        let value: Value = serde_json::from_str(&self.stdout).unwrap();
        assert!(value.is_object(), "{value}");
        value
    }

    /// It ends with this code and one line of error, which says all of this; besides it, only the two lines of a pointer
    /// into a notation. Nothing is printed that looks like a crash or a result.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, parts: &[&str]) {
        let Done { args, stderr, stdout, .. } = self;
        assert_eq!(self.code, Some(code), "{args}: {stderr}");
        let errors: Vec<&str> = stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "{args}: {stderr}");
        for part in parts {
            assert!(errors[0].contains(part), "{args}: `{part}` is not in: {}", errors[0]);
        }
        for crash in ["panicked", "RUST_BACKTRACE", "stack backtrace"] {
            assert!(!stderr.contains(crash), "{args}: {stderr}");
        }
        assert_eq!(stdout, "", "{args}");
    }
}

#[test]
fn wrong_usage_is_one_line_and_code_2() {
    let room = Room::new();
    for (args, parts) in [
        ("--threads 0", &["threads", "0 threads", "1 or more"][..]),
        ("--batch-size 0", &["batch size", "0 images", "1 or more"]),
        ("--epochs 0", &["epochs", "0 epochs", "1 or more"]),
        ("--print-every 0", &["print-every", "1 or more"]),
        ("--train-limit 0", &["training split", "0 of 98", "give 1 to 98"]),
        ("--train-limit 99", &["99 of 98"]),
        (
            "--net con4-relu-affine10",
            &["network notation", "character 1", "did you mean `conv4`", "con4-relu-affine10"],
        ),
        ("--net conv4-relu-affine9", &["9 scores", "10 classes", "affine10"]),
        ("--net conv4k40p2-affine10", &["conv2d", "window of 40", "padded height of 36", "smaller filter"]),
        ("--net conv4-pool40-affine10", &["pool2d", "window of 40", "smaller"]),
        ("--preset three-layers", &["preset", "`three-layers`", "three-layer, three-layer-65, deep"]),
        ("--optimizer adams", &["update rule", "`adams`", "sgd, momentum"]),
        ("--init gaussian", &["initialisation", "`gaussian`", "gaussian:STD"]),
        ("--schedule exp", &["schedule", "`exp`", "exp:FACTOR"]),
        ("--learning-rate 0", &["learning rate", "0"]),
        ("--quiet --shift 32", &["augmentation", "32 pixels", "less than 32"]),
        ("--quiet --cutout 32", &["augmentation", "cutout of 32 pixels", "less than 32"]),
    ] {
        room.run(&format!("train --data-dir pics {args}")).fails(2, parts);
    }
    room.run("bench --repeats 0").fails(2, &["repeats", "1 or more"]);
    room.run("data pictures new --records 0").fails(2, &["pictures", "0 records", "1 or more"]);
    room.run("summary --net conv4-relu-affine10]").fails(2, &["network notation", "character 20"]);
    let pointed = room.run("summary --net conv4-rely-affine10").stderr;
    assert!(pointed.ends_with("conv4-rely-affine10\n      ^\n"), "{pointed}");
    // Nothing is downloaded for a command that cannot work.
    let early = room.run("train --batch-size 0");
    early.fails(2, &["batch size"]);
    assert!(!early.stderr.contains("downloading"), "{}", early.stderr);
    assert!(!room.path("runs").exists(), "a failed start leaves nothing");
    // What clap finds out is code 2 too, with its own text.
    for args in
        ["train --batch-size many", "train --flip=often", "eval --views 3", "trian", "train --optimise", "predict", ""]
    {
        let done = room.run(args);
        assert_eq!((done.code, done.stdout.as_str()), (Some(2), ""), "{args}: {}", done.stderr);
    }
}

#[test]
fn broken_data_is_one_line_and_code_1() {
    type Break = fn(&Path);
    let cases: &[(Break, &[&str])] = &[
        (
            |dir| {
                let bytes = fs::read(dir.join(TRAIN_BATCHES[1])).unwrap();
                fs::write(dir.join(TRAIN_BATCHES[1]), &bytes[..2 * RECORD + 100]).unwrap();
            },
            &["data_batch_2.bin", "100 bytes over", "truncated", "gemmnet data fetch"],
        ),
        (
            |dir| {
                let mut bytes = fs::read(dir.join(TEST_BATCH)).unwrap();
                bytes[3 * RECORD] = 12;
                fs::write(dir.join(TEST_BATCH), bytes).unwrap();
            },
            &["test_batch.bin", "record 3 has label 12", "0 to 9", "gemmnet data fetch"],
        ),
        (
            |dir| fs::remove_file(dir.join(TRAIN_BATCHES[4])).unwrap(),
            &["pics", "data_batch_5.bin missing", "gemmnet data fetch"],
        ),
        (
            |dir| fs::write(dir.join(TRAIN_BATCHES[0]), []).unwrap(),
            &["data_batch_1.bin", "empty", "gemmnet data fetch"],
        ),
        (
            |dir| {
                fs::remove_file(dir.join(TRAIN_BATCHES[2])).unwrap();
                fs::create_dir(dir.join(TRAIN_BATCHES[2])).unwrap();
            },
            &["data_batch_3.bin", "is a folder, not a file", "gemmnet data fetch"],
        ),
        #[cfg(unix)]
        (
            |dir| {
                // Unlike permissions, a link in a circle stops the superuser too.
                fs::remove_file(dir.join(TRAIN_BATCHES[3])).unwrap();
                std::os::unix::fs::symlink(TRAIN_BATCHES[3], dir.join(TRAIN_BATCHES[3])).unwrap();
            },
            &["cannot read", "data_batch_4.bin", "check its permissions"],
        ),
        (|dir| fs::remove_dir_all(dir).unwrap(), &["pics", "there is no such folder", "gemmnet data fetch"]),
    ];
    for (destroy, parts) in cases {
        let room = Room::new();
        destroy(&room.path("pics"));
        room.run(&format!("train --data-dir pics --net {NET}")).fails(1, parts);
        assert!(!room.path("runs").exists(), "a failed start leaves nothing");

        let verify = room.run("data verify pics");
        assert_eq!(verify.code, Some(1));
        for part in *parts {
            assert!(verify.stdout.contains(part), "`{part}` is not in: {}", verify.stdout);
        }
        assert_eq!(room.run("doctor --data-dir pics").code, Some(1), "the doctor sees it");
    }
}

#[test]
fn files_that_do_not_serve_are_code_1() {
    let room = Room::new();
    fs::write(room.path("not.png"), "not a picture").unwrap();
    fs::write(room.path("odd.bin"), [0; RECORD + 1]).unwrap();
    room.run("eval").fails(1, &["runs", "no run with a network", "gemmnet train", "--checkpoint"]);
    room.run("eval --checkpoint nothing.safetensors").fails(1, &["cannot read", "nothing.safetensors"]);
    room.run("eval --checkpoint pics").fails(1, &["pics", "no model.safetensors"]);
    fs::write(room.path("junk.safetensors"), "junk").unwrap();
    room.run("eval --checkpoint junk.safetensors").fails(1, &["junk.safetensors", "not a checkpoint"]);
    let train = format!("train --data-dir pics --net {NET}");
    room.run("train --resume nowhere").fails(1, &["cannot read nowhere", "the config.toml of a run"]);
    room.run(&format!("{train} --run junk.safetensors/in")).fails(1, &["junk.safetensors/in", "--run"]);
    room.run(&format!("{train} --run pics")).fails(1, &["pics", "exists already", "another with --run"]);
    room.run(&format!("{train} --config junk.safetensors")).fails(1, &["junk.safetensors", "line 1", "--help"]);
    room.run(&format!("{train} --config nothing.toml")).fails(1, &["cannot read nothing.toml", "config.toml of a run"]);
    room.run("data fetch --data-dir new").fails(1, &["cannot download", NOWHERE, "--mirror", "GEMMNET_CIFAR10_URL"]);
    room.run("data fetch --data-dir pics --url ftp://here").fails(2, &["`ftp://here`", "https://"]);

    room.train("--epochs 1");
    room.run("predict none.png").fails(1, &["cannot read", "none.png", "JPEG, PNG"]);
    room.run("predict not.png").fails(1, &["not.png", "no picture", "JPEG, PNG"]);
    room.run("predict odd.bin").fails(1, &["odd.bin", "3074 bytes", "3073"]);
    room.run("predict pics/test_batch.bin:20").fails(1, &["test_batch.bin", "no record 20", "0 to 19"]);
    write_png(&room.path("large.png"), (64, 64));
    room.run("predict large.png").succeeds();
}

fn write_png(path: &Path, (width, height): (u32, u32)) {
    let pixel = |x: u32, y: u32| image::Rgb([0, 1, 2].map(|sample| ((3 * (y * width + x) + sample) % 251) as u8));
    image::RgbImage::from_fn(width, height, pixel).save(path).unwrap();
}

#[test]
fn train_reports_as_json() {
    let room = Room::new();
    let report = room.train("--epochs 3 --seed 5 --threads 2");
    for key in ["kept_val_accuracy", "final_val_accuracy", "test_accuracy", "test_1000_accuracy"] {
        let accuracy = report[key].as_f64().unwrap_or(f64::NAN);
        assert!((0.0..=1.0).contains(&accuracy), "{key}: {}", report[key]);
    }
    assert!(report["train_seconds"].as_f64().unwrap() > 0.0 && report["images_per_second"].as_f64().unwrap() > 0.0);
    // 4 filters of 3x3x3 and biases; 4x16x16 inputs to 10 outputs and biases.
    assert_eq!(report["parameters"], 4 * 27 + 4 + 4 * 256 * 10 + 10);
    assert_eq!((&report["seed"], &report["threads"]), (&5.into(), &2.into()));
    assert_eq!((&report["data"], &report["epochs"]), (&"pictures".into(), &3.into()));
    assert_eq!(report["val_accuracy"].as_array().unwrap().len(), 4, "before training and after each epoch");
    for file in ["config.toml", "history.jsonl", "model.safetensors", "checkpoints/step-12.safetensors"] {
        assert!(room.path("runs/1").join(file).is_file(), "{file}");
    }
    // 98 of 100 pictures are for training: 4 batches of 20, 3 times.
    assert_eq!(report["steps"], 12);
}

/// Parts of epochs: trained, measured at their end, and stopped after; what follows is what would have been.
#[test]
fn train_stops_within_an_epoch_and_goes_on() {
    let room = Room::new();
    let whole = room.train("--epochs 1.5");
    assert_eq!((&whole["steps"], &whole["epochs"]), (&6.into(), &1.5.into()));
    assert_eq!(whole["val_accuracy"].as_array().unwrap().len(), 3, "after 0, 1 and 1.5 epochs");
    let part = room.train("--epochs 1.5 --stop-after 0.5 --run part");
    assert_eq!((&part["steps"], &part["epochs"]), (&2.into(), &1.5.into()));
    let rest = room.json("train --data-dir pics --resume part");
    assert_eq!(course(&rest), course(&whole));
    let text = room.run(&format!("train --data-dir pics --net {NET} --batch-size 20 --epochs 0.5")).succeeds();
    assert!(text.stdout.contains("(Epoch 0.5 / 0.5)"), "{}", text.stdout);
    room.run(&format!("train --net {NET} --stop-after 0")).fails(2, &["stop-after", "more than 0"]);
}

/// Where backward updates a matrix, what that moves is its own, and no longer the optimizer's.
#[test]
fn the_profile_shows_who_updates_what() {
    let args = "train --data-dir pics --net affine256-relu-affine10 --batch-size 20 --epochs 1 --optimizer adam";
    let report = Room::new().run(&format!("{args} --profile --json")).succeeds().object();
    let bytes = |operation: &str, phase: &str| {
        let is_it = |row: &&Value| row["operation"] == operation && row["phase"] == phase;
        report["profile"].as_array().unwrap().iter().find(is_it).unwrap()["bytes"].as_u64().unwrap()
    };
    let (steps, x, out, scores) = (4, 3 * 1024, 256, 10);
    let (matrix, rest) = (x * out, out + out * scores + scores);
    // The matrix and two moments are read and written, the bias is read and its gradient written.
    let backward = 4 * steps * (20 * (x + out) + 6 * matrix + 2 * out);
    assert_eq!(bytes("1 affine256-relu", "backward"), backward);
    assert_eq!(bytes("adam", "optimizer"), 4 * steps * 7 * rest);
}

/// Every operation of a step is in it, as often as it ran, with its own count of work; without being asked for it is not.
#[test]
fn train_says_where_the_time_went() {
    let room = Room::new();
    let net = "conv4-relu-pool-affine10";
    let args = format!("train --data-dir pics --net {net} --batch-size 20 --epochs 2 --optimizer adam");
    let plain = room.json(&args);
    assert!(plain.get("profile").is_none(), "{plain}");
    let done = room.run(&format!("{args} --profile --json")).succeeds();
    let report = done.object();
    let row = |operation: &str, phase: &str| {
        let is_it = |row: &&Value| row["operation"] == operation && row["phase"] == phase;
        let count = |row: &Value| ["calls", "flops", "bytes"].map(|key| row[key].as_u64().unwrap());
        count(report["profile"].as_array().unwrap().iter().find(is_it).unwrap_or_else(|| panic!("{operation} {phase}")))
    };
    // 98 images: 4 batches of 20, twice. The kernel is 3x3, its input 3x32x32 and its output, pooled, 4x16x16.
    let (steps, images, products, weights) = (8, 8 * 20, 2 * 27 * 4 * 1024, 27 * 4 + 4);
    let (x, out, scores) = (3 * 1024, 4 * 256, 10);
    let parameters = weights + out * scores + scores;
    let conv = "1 conv4-relu-pool";
    assert_eq!(row(conv, "forward"), [steps, images * products, 4 * (images * (x + out) + steps * weights)]);
    // The first block makes no gradient of its input.
    assert_eq!(row(conv, "backward"), [steps, images * products, 4 * (images * (x + out) + steps * 2 * weights)]);
    let bytes = 4 * (images * (2 * out + scores) + steps * 2 * (out * scores + scores));
    assert_eq!(row("2 affine10", "backward"), [steps, images * 4 * out * scores, bytes]);
    assert_eq!(row("batch", "data"), [steps, 0, images * x * (1 + 4)]);
    let [calls, flops, bytes] = row("adam", "optimizer");
    assert!(calls == steps && flops == 0 && bytes >= steps * 7 * 4 * parameters, "{bytes} bytes");
    assert!(row(conv, "test")[0] > 0);
    let seconds: Vec<_> = report["profile"].as_array().unwrap().iter().map(|row| row["seconds"].as_f64()).collect();
    assert!(seconds.is_sorted_by(|a, b| a >= b), "{seconds:?}");
    // The table shows the same rows.
    let lines = done.stderr.lines().filter(|line| line.starts_with(conv)).count();
    assert_eq!(lines, 3, "{}", done.stderr);

    let by_variable = |value| {
        let output = room.std_command(&args).env("GEMMNET_PROFILE", value).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap())
    };
    let (code, text) = by_variable("1");
    assert!(code == Some(0) && text.contains(conv), "{text}");
    let (code, text) = by_variable("0");
    assert!(code == Some(0) && !text.contains(conv), "{text}");
    let (code, text) = by_variable("yes");
    assert!(code == Some(2) && text.contains("`yes` is neither 0 nor 1"), "{text}");
}

#[test]
fn train_prints_lines_where_nobody_watches() {
    let room = Room::new();
    let done = room
        .run(&format!("train --data-dir pics --net {NET} --batch-size 20 --epochs 1 --print-every 3 --l2 0"))
        .succeeds();
    let lines: Vec<&str> = done.stdout.lines().collect();
    assert!(lines[0].starts_with("conv4-relu-pool-affine10-softmax: 10,362 parameters, f32"), "{}", done.stdout);
    for (line, start) in lines[1..].iter().zip([
        "(Iteration 1 / 4) loss: 2.30",
        "(Epoch 0 / 1) train acc: ",
        "(Iteration 4 / 4) loss: ",
        "(Epoch 1 / 1) train acc: ",
        "validation accuracy: ",
        "test accuracy: ",
    ]) {
        assert!(line.starts_with(start), "{line} does not start with {start}");
    }
    assert_eq!(lines.len(), 8);
    let quiet = room.run(&format!("train --data-dir pics --net {NET} --epochs 1 --quiet")).succeeds();
    assert_eq!(quiet.stdout.lines().count(), 3, "{}", quiet.stdout);
}

/// Everything of a result that is not time.
fn course(report: &Value) -> [Value; 5] {
    ["final_loss", "val_accuracy", "train_accuracy", "test_accuracy", "steps"].map(|key| report[key].clone())
}

#[test]
fn the_seed_decides_and_the_threads_do_not() {
    let room = Room::new();
    let recipe =
        "--net conv8-bn-relu-pool-affine20-relu-dropout0.5-affine10 --epochs 2 --batch-size 16 --flip --shift 2";
    let train = |more: &str| course(&room.json(&format!("train --data-dir pics {recipe} {more}")));
    let first = train("--seed 1 --threads 1");
    assert_eq!(first, train("--seed 1 --threads 1"));
    assert_eq!(first, train("--seed 1 --threads 2"));
    assert_eq!(first, train("--seed 1 --threads 5"));
    assert_ne!(first, train("--seed 2 --threads 1"));
    let by_variable = room.std_command("doctor --json").env("GEMMNET_NUM_THREADS", "3").output().unwrap();
    assert!(String::from_utf8(by_variable.stdout).unwrap().contains("\"threads\":3"));
}

#[test]
fn augmentation_is_spelled_in_several_ways() {
    let room = Room::new();
    let mut first = Vec::new();
    for same in [
        &["", "--flip=none", "--flip=false --shift 0 --cutout 0", "--shift-fill zeros"][..],
        &["--flip", "--flip=true", "--flip=random"],
        &["--flip=alternating"],
        &["--shift 3"],
        &["--shift 3 --shift-fill reflect"],
        &["--cutout 9"],
    ] {
        let mut courses = same.iter().map(|args| course(&room.train(&format!("--epochs 2 {args}"))));
        let one = courses.next().unwrap();
        assert!(courses.all(|other| other == one), "{same:?}");
        assert!(!first.contains(&one), "{same:?} is like something else");
        first.push(one);
    }
    // Given again, it holds from there on.
    let resumed = |more: &str| {
        let report = room.train("--epochs 1 --flip");
        course(&room.json(&format!("train --resume {} --epochs 2 {more}", report["run"].as_str().unwrap())))
    };
    assert_eq!(resumed(""), resumed("--flip=random --shift 0"));
    for more in ["--flip=none", "--cutout 9", "--shift 2", "--shift 2 --shift-fill reflect"] {
        assert_ne!(resumed(""), resumed(more), "{more}");
    }
}

#[test]
fn options_override_the_preset() {
    let room = Room::new();
    let report = room.json(&format!("train --preset three-layer --data-dir pics --net {NET} --train-limit 30"));
    // The preset's one epoch; its batch of 50 is cut down to the 30 images.
    assert_eq!((&report["epochs"], &report["steps"]), (&1.into(), &1.into()));
    assert_eq!(report["network"], format!("{NET}-softmax"));
    let double =
        room.train("--epochs 1 --dtype f64 --optimizer momentum --sampler replacement --normalize per-channel");
    assert_eq!(double["dtype"], "f64");
    assert_eq!(room.json("eval --data-dir pics")["accuracy"], double["test_accuracy"], "eval reads f64 too");
}

#[test]
fn training_goes_on_where_it_was_saved() {
    let room = Room::new();
    let straight = room.train("--epochs 4 --run straight");
    room.train("--epochs 2 --run parts");
    let resumed = room.json("train --resume parts --epochs 4");
    assert_eq!(course(&resumed), course(&straight));
    assert_eq!(resumed["run"], "parts");
    for file in
        ["model.safetensors", "checkpoints/step-12.safetensors", "checkpoints/step-16.safetensors", "config.toml"]
    {
        let [straight, parts] = ["straight", "parts"].map(|run| fs::read(room.path(run).join(file)).unwrap());
        assert!(straight == parts, "{file}: the files are the same, to the bit");
    }
    assert_eq!(fs::read_dir(room.path("parts/checkpoints")).unwrap().count(), 2);
    let before = fs::read_to_string(room.path("parts/config-until-8.toml")).unwrap();
    assert!(before.contains("epochs = 2.0"), "{before}");
    let resume = "train --resume parts";
    room.run(&format!("{resume} --seed 7")).fails(2, &["seed", "7", "leave it out"]);
    room.run(&format!("{resume} --epochs 1")).fails(2, &["epochs", "16 iterations"]);
    room.run(&format!("{resume} --train-limit 50")).fails(2, &["checkpoint", "98 images", "50"]);
    let conflict = room.run(&format!("{resume} --net {NET}"));
    assert_eq!(conflict.code, Some(2), "{}", conflict.stderr);
    assert!(conflict.stderr.contains("'--resume <DIR>' cannot be used with"), "{}", conflict.stderr);
}

#[test]
fn eval_and_predict_use_the_saved_network() {
    let room = Room::new();
    let report = room.train("--epochs 10");
    for (split, key, images) in
        [("validation", "kept_val_accuracy", 2), ("test", "test_1000_accuracy", 20), ("test-full", "test_accuracy", 20)]
    {
        let eval = room.json(&format!("eval --data-dir pics --split {split}"));
        assert_eq!((&eval["accuracy"], &eval["images"]), (&report[key], &images.into()), "{split}");
        let row = |row: &Value| row.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum::<u64>();
        let confusion = eval["confusion"].as_array().unwrap();
        assert_eq!((confusion.len(), confusion.iter().map(row).sum::<u64>()), (10, images));
    }
    let table = room.run("eval --data-dir pics").succeeds().stdout;
    assert!(table.contains("checkers") && table.contains("accuracy: "), "{table}");
    assert!(!table.contains("views"), "{table}");
    for views in [1, 2, 6] {
        assert_eq!(room.json(&format!("eval --data-dir pics --views {views}"))["views"], views);
    }
    let six = room.run("eval --data-dir pics --views 6").succeeds().stdout;
    assert!(six.contains("(test-full, 6 views of each)"), "{six}");

    // The best class of every record is right as often as eval says.
    let predictions = room.json("predict pics/test_batch.bin")["predictions"].as_array().unwrap().clone();
    let right = predictions.iter().filter(|p| p["classes"][0]["label"] == p["label"]).count();
    assert_eq!(right as f64 / 20.0, report["test_accuracy"].as_f64().unwrap());
    for prediction in &predictions {
        let p: Vec<f64> = (0..3).map(|i| prediction["classes"][i]["probability"].as_f64().unwrap()).collect();
        assert!(p[0] >= p[1] && p[1] >= p[2] && p.iter().sum::<f64>() <= 1.0 + 1e-12, "{p:?}");
    }
    assert_eq!(room.json("predict pics/test_batch.bin:7")["predictions"][0], predictions[7]);
    write_png(&room.path("drawn.png"), (32, 32));
    let text = room.run("predict drawn.png pics/test_batch.bin:0").succeeds().stdout;
    assert!(text.starts_with("drawn.png: ") && text.lines().count() == 2, "{text}");
    // Other data than it was trained on is no measure.
    fs::remove_file(room.path("pics/batches.meta.txt")).unwrap();
    room.run("eval --data-dir pics").fails(1, &["pics", "other classes (airplane", "(disc", "--data-dir"]);
}

/// A trained network as ONNX and npz, and what cannot be written.
#[test]
fn export_writes_what_other_programs_read() {
    let room = Room::new();
    room.train("--epochs 1 --run net");
    fs::copy(room.path("net/model.safetensors"), room.path("net.safetensors")).unwrap();
    let onnx = room.json("export --checkpoint net.safetensors --pixels");
    assert_eq!((&onnx["file"], &onnx["format"], &onnx["pixels"]), (&"net.onnx".into(), &"onnx".into(), &true.into()));
    let bytes = fs::read(room.path("net.onnx")).unwrap();
    let values = onnx["parameters"].as_u64().unwrap() as usize;
    assert!(bytes.len() > 4 * values, "{} bytes for {values} values", bytes.len());
    let names = serde_json::to_string(&CLASS_NAMES).unwrap();
    assert!(
        bytes.windows(names.len()).any(|text| text == names.as_bytes()),
        "the metadata have the names of the classes"
    );

    let npz = room.json("export --checkpoint net.safetensors --format npz --out values.npz");
    assert_eq!(npz["file"], "values.npz");
    let mut npz = ndarray_npy::NpzReader::new(fs::File::open(room.path("values.npz")).unwrap()).unwrap();
    let network = Network::<f32>::load(&room.path("net.safetensors")).unwrap();
    for param in network.params().iter() {
        let array: ndarray::ArrayD<f32> = npz.by_name(&param.name).unwrap();
        assert_eq!(array, network.params().get(&param.name).unwrap(), "{}", param.name);
    }
    let notation: ndarray::Array1<u8> = npz.by_name("network").unwrap();
    assert_eq!(String::from_utf8(notation.to_vec()).unwrap(), network.spec().to_string());
    let mean: ndarray::Array3<f32> = npz.by_name("normalizer.mean").unwrap();
    assert_eq!(mean.dim(), (3, 32, 32));

    room.run("export --checkpoint net.safetensors --format npz --pixels").fails(2, &["--pixels", "normalizer.mean"]);
    room.run("export --checkpoint nothing.safetensors").fails(1, &["cannot read", "nothing.safetensors"]);
    room.run("export --checkpoint net.safetensors --out missing/net.onnx").fails(1, &["missing/net.onnx", "exists"]);
    network.save(&room.path("alone.safetensors")).unwrap();
    room.run("export --checkpoint alone.safetensors").succeeds();
    room.run("export --checkpoint alone.safetensors --pixels").fails(1, &["a network alone", "--mean"]);
    room.run("predict --checkpoint alone.safetensors pics/test_batch.bin:0").fails(1, &["a network alone", "--mean"]);
}

/// What another program trained predicts and is measured like any other network; what does not fit is said.
#[test]
fn import_makes_a_network_of_a_state_dict() {
    let room = Room::new();
    let network = Network::<f32>::new(&NET.parse().unwrap(), [3, 32, 32], Init::He, 0).unwrap();
    network.save(&room.path("weights.safetensors")).unwrap();
    fs::write(room.path("names.txt"), (0..10).map(|i| format!("kind {i}\n")).collect::<String>()).unwrap();
    // Our own matrices are (D, M), PyTorch's (M, D): a square one would go unnoticed, this one is told.
    let import = format!("import weights.safetensors --net {NET}");
    room.run(&import).fails(1, &["affine1.weight", "[1024, 10]", "[10, 1024]"]);

    let conv = "conv4-relu-pool-conv10k16p0-gap";
    let network = Network::<f32>::new(&conv.parse().unwrap(), [3, 32, 32], Init::He, 0).unwrap();
    network.save(&room.path("weights.safetensors")).unwrap();
    let import = format!("import weights.safetensors --net {conv}");
    let full = "--mean 0.5,0.5,0.5 --std 0.25,0.25,0.5 --class-names names.txt --out taken.safetensors";
    let report = room.json(&format!("{import} {full}"));
    assert_eq!(report["layers"][1], serde_json::json!({ "layer": "conv2", "from": "conv2", "bias_in_mean": false }));
    let predicted = room.json("predict --checkpoint taken.safetensors pics/test_batch.bin:0");
    assert!(predicted["predictions"][0]["classes"][0]["class"].as_str().unwrap().starts_with("kind "), "{predicted}");
    let model = gemmnet::train::Model::<f32>::load(&room.path("taken.safetensors")).unwrap();
    let normalizer = model.normalizer.unwrap();
    assert_eq!((normalizer.mean()[0], normalizer.scale()), (127.5, &[1.0 / 63.75, 1.0 / 63.75, 1.0 / 127.5][..]));
    // Without names the number of classes has to be that of the data.
    room.run(&format!("{import} --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5")).succeeds();
    room.run("eval --checkpoint imported.safetensors --data-dir pics").succeeds();

    for (args, code, parts) in [
        ("--mean 0.5 --std 0.5", 2, &["mean: 1 numbers for 3 channels"][..]),
        ("--mean 0.5,0.5,0.5 --std 0.5,0.5,0", 2, &["std: ", "above 0"]),
        ("--mean 0.5,0.5,0.5", 2, &["std: 0 numbers for 3 channels"]),
        ("--input 3x32", 2, &["3x32", "such as 3x224x224"]),
        ("--map nothing.json", 1, &["nothing.json", "conv3"]),
        ("--map names.txt", 1, &["names.txt", "no map of names"]),
        ("--class-names pics/test_batch.bin", 1, &["test_batch.bin", "name of a class"]),
    ] {
        room.run(&format!("{import} {args}")).fails(code, parts);
    }
    fs::write(room.path("few.txt"), "cat\n").unwrap();
    room.run(&format!("{import} --class-names few.txt")).fails(2, &["1 names", "10 classes"]);
    room.run("import nothing.safetensors --net affine2").fails(1, &["nothing.safetensors", "save_file"]);
}

/// A network that the library made for grey pictures of 12x9 pixels.
#[test]
fn predict_takes_the_size_from_the_network() {
    let room = Room::new();
    let images = Array4::from_shape_fn((6, 1, 9, 12), |(n, _, h, w)| (n * 40 + h * 9 + w) as u8);
    let names = ["cup", "jug", "pot"].map(String::from).to_vec();
    let labelled = (images.view(), &[0, 1, 2, 0, 1, 2][..]);
    let arrays = Arrays::new(names, labelled, labelled, labelled).unwrap();
    let data = Dataset::new(Arc::new(arrays), Normalization::PerChannel).unwrap();
    let network = Network::<f32>::new(&"conv2-relu-affine3".parse().unwrap(), data.dim(), Init::He, 0).unwrap();
    let solver = Solver::new(network, data, SolverOptions::default()).unwrap();
    fs::create_dir_all(room.path("runs/mine")).unwrap();
    solver.checkpoint().save(&room.path("runs/mine/model.safetensors")).unwrap();

    image::GrayImage::from_fn(12, 9, |x, y| image::Luma([(x + 12 * y) as u8])).save(room.path("grey.png")).unwrap();
    write_png(&room.path("coloured.png"), (12, 9));
    write_png(&room.path("turned.png"), (9, 12));
    let predictions = room.json("predict grey.png coloured.png")["predictions"].as_array().unwrap().clone();
    assert_eq!(predictions.len(), 2);
    let mut seen: Vec<_> = predictions[0]["classes"].as_array().unwrap().iter().map(|c| c["class"].clone()).collect();
    seen.sort_by_key(Value::to_string);
    assert_eq!(seen, ["cup", "jug", "pot"]);
    room.run("predict turned.png").succeeds();
    room.run("predict pics/test_batch.bin").fails(1, &["3x32x32", "takes 1x9x12", "give JPEG, PNG, WebP or BMP files"]);
    room.run("eval --data-dir pics").fails(1, &["pics", "3x32x32", "trained on 1x9x12", "--data-dir"]);
}

#[test]
fn without_cifar10_it_trains_on_the_pictures_and_says_so() {
    let room = Room::new();
    let train = |more: &str| room.run(&format!("train --net {NET} --epochs 1 {more}")).succeeds();
    let done = train("--json");
    assert_eq!(done.object()["data"], "pictures");
    for part in ["cannot download", NOWHERE, "built-in pictures", "gemmnet data fetch", "--data-dir"] {
        assert!(done.stderr.contains(part), "`{part}` is not in: {}", done.stderr);
    }
    let again = train("--json --no-fetch");
    assert!(!again.stderr.contains("cannot download"), "{}", again.stderr);
    assert_eq!(course(&again.object()), course(&done.object()), "always the same pictures");
    assert_eq!(room.json("eval")["accuracy"], done.object()["test_accuracy"], "eval finds the pictures again");
    // Asked for by name, data has to be there.
    room.run(&format!("train --net {NET} --data-dir elsewhere")).fails(1, &["elsewhere", "no such folder"]);
}

#[test]
fn pictures_never_replace_other_data() {
    let room = Room::new();
    fs::create_dir(room.path("mine")).unwrap();
    fs::write(room.path("mine").join(TRAIN_BATCHES[0]), "mine").unwrap();
    room.run("data pictures mine --records 1").fails(1, &["mine", "already holds batches"]);
    assert_eq!(fs::read(room.path("mine").join(TRAIN_BATCHES[0])).unwrap(), b"mine");
    room.run("data pictures pics --records 3 --seed 2").succeeds();
    let verify = room.json("data verify pics");
    assert_eq!((&verify["batches"][TEST_BATCH], &verify["official_size"]), (&3.into(), &false.into()));
    assert_eq!(verify["problems"], Value::Array(Vec::new()));
}

#[test]
fn bench_compares_naive_and_fast_layers() {
    let room = Room::new();
    let bench = room.json("bench --repeats 1");
    let rows = bench["rows"].as_array().unwrap();
    let text = |row: &Value, key: &str| row[key].as_str().unwrap().to_owned();
    let cases: Vec<_> = rows.iter().map(|row| ["case", "dtype", "direction"].map(|key| text(row, key))).collect();
    for case in ["conv", "pool"] {
        for dtype in ["f64", "f32"] {
            for direction in ["forward", "backward"] {
                assert!(cases.contains(&[case, dtype, direction].map(String::from)), "{case} {dtype} {direction}");
            }
        }
    }
    assert_eq!(rows.len(), 8);
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
        assert!(number("naive_ms") > 0.0 && number("fast_ms") > 0.0, "{row}");
        assert!((number("speedup") * number("fast_ms") / number("naive_ms") - 1.0).abs() < 1e-9, "{row}");
        assert!(number("rel_error") <= if row["dtype"] == "f64" { 1e-9 } else { 1e-4 }, "{row}");
    }
}

#[test]
fn gradcheck_finds_every_gradient_right() {
    let room = Room::new();
    let gradcheck = room.json("gradcheck");
    let rows = gradcheck["rows"].as_array().unwrap();
    for row in rows {
        assert!(row["max_rel_error"].as_f64().unwrap() <= row["limit"].as_f64().unwrap(), "{row}");
        assert!(row["checked"].as_u64().unwrap() > row["skipped"].as_u64().unwrap(), "{row}");
    }
    for layer in ["conv", "max pool", "spatial batchnorm", "softmax", "svm", "conv-relu-pool", "three-layer net"] {
        assert!(rows.iter().any(|row| row["layer"] == layer), "{layer} is not checked");
    }
}

#[test]
fn summary_and_presets_describe_networks() {
    let room = Room::new();
    let summary = room.json("summary --net conv4k5p0-relu-pool-affine10-svm");
    assert_eq!(summary["network"], "conv4k5p0-relu-pool-affine10-svm");
    let layers = summary["layers"].as_array().unwrap();
    assert_eq!(layers[0]["output"], serde_json::json!([4, 14, 14]));
    assert_eq!((&layers[0]["parameters"], &layers[0]["multiply_adds"]), (&304.into(), &(300 * 28 * 28).into()));
    assert_eq!(summary["parameters"], 304 + 784 * 10 + 10);
    let table = room.run("summary --preset three-layer").succeeds().stdout;
    assert!(table.contains("total") && table.contains("4,106,246"), "{table}");

    let presets = room.json("train --list-presets")["presets"].as_array().unwrap().clone();
    let names: Vec<_> = presets.iter().map(|preset| preset["name"].as_str().unwrap()).collect();
    let all =
        ["sprint", "sprint-75", "sprint-85", "record", "three-layer", "three-layer-65", "deep", "resnet20", "own"];
    assert_eq!(names, all);
    // What the list says a preset is, the program takes as its options, and both mean the same.
    for preset in presets {
        // Whitening needs LAPACK.
        if cfg!(not(feature = "blas")) && preset["arguments"].as_str().unwrap().contains("whiten") {
            continue;
        }
        let arguments = preset["arguments"].as_str().unwrap().replace('\'', "");
        let (name, limit) = (preset["name"].as_str().unwrap(), "--train-limit 4 --epochs 1 --data-dir pics");
        let by_name = room.json(&format!("train --preset {name} {limit}"));
        let arguments = arguments.split(" --epochs").next().unwrap().to_owned()
            + arguments.split_once("--batch-size").map(|(_, rest)| format!(" --batch-size{rest}")).unwrap().as_str();
        let by_options = room.json(&format!("train {arguments} {limit}"));
        assert_eq!(course(&by_name), course(&by_options), "{name}");
    }
}

#[test]
fn doctor_describes_the_machine() {
    let room = Room::new();
    let doctor = room.json("doctor --threads 2");
    assert!(["OpenBLAS", "matrixmultiply"].contains(&doctor["blas"].as_str().unwrap()));
    assert_eq!((&doctor["threads"], &doctor["version"]), (&2.into(), &env!("CARGO_PKG_VERSION").into()));
    assert_eq!((&doctor["data_dir"], &doctor["problems"]), (&Value::Null, &Value::Array(Vec::new())));
    let text = room.run("doctor --data-dir pics").succeeds().stdout;
    assert!(text.contains("BLAS") && text.contains("pics (120 records"), "{text}");
}

#[test]
fn vector_instructions_are_limited_by_a_variable() {
    let room = Room::new();
    let doctor = |isa| {
        room.std_command("doctor --json").env("GEMMNET_MAX_ISA", isa).env_remove("OPENBLAS_CORETYPE").output().unwrap()
    };
    for isa in ["baseline", "avx2", "avx512"] {
        let answer: Value = serde_json::from_slice(&doctor(isa).stdout).unwrap();
        let used = answer["isa"].as_str().unwrap();
        let place = |isa| ["baseline", "avx2", "avx512"].iter().position(|&name| name == isa);
        assert!(
            place(used).is_some() && place(used) <= place(isa) && answer["problems"] == Value::Array(Vec::new()),
            "{answer}"
        );
        let core = answer["blas_core"].as_str().unwrap();
        assert!(isa == "avx512" || !["SkylakeX", "Cooperlake", "SapphireRapids"].contains(&core), "{isa}: {core}");
    }
    let refused = doctor("avx1024");
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && said.contains("avx1024") && said.contains("baseline, avx2 or avx512"),
        "{said}"
    );
}

#[test]
fn help_has_examples_and_the_version_is_the_crates() {
    let room = Room::new();
    for command in ["", "train", "eval", "predict", "gradcheck", "bench", "summary", "data", "doctor"] {
        let help = room.run(&format!("{command} --help")).succeeds().stdout;
        assert!(help.contains("Examples:") && help.contains("--threads <N>"), "{command}: {help}");
    }
    assert_eq!(room.run("--version").succeeds().stdout, concat!("gemmnet ", env!("CARGO_PKG_VERSION"), "\n"));
}

/// Starts a long training and waits until it runs.
#[cfg(unix)]
fn start_training(room: &Room) -> (std::process::Child, std::io::BufReader<std::process::ChildStdout>) {
    use std::io::{BufRead, BufReader};

    let mut child = room
        .std_command(&format!("train --data-dir pics --net {NET} --epochs 1000000 --print-every 1"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    while !line.starts_with("(Epoch 0") {
        line.clear();
        assert_ne!(lines.read_line(&mut line).unwrap(), 0, "it ended early");
    }
    (child, lines)
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    use std::io::Read;

    let room = Room::new();
    let (child, mut lines) = start_training(&room);
    assert!(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    // Read on, so that it does not wait for us.
    lines.read_to_string(&mut String::new()).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("gemmnet train --resume runs/1"), "{stderr}");
    assert!(!stderr.contains("error:"), "{stderr}");
    assert!(room.path("runs/1/model.safetensors").is_file());
    room.run("eval").succeeds();
}

#[cfg(unix)]
#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let room = Room::new();
    let (child, lines) = start_training(&room);
    drop(lines);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(141), "{stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("error"), "{stderr}");
}
