//! A bad value for every option of every command, and places that cannot be written for everything that is: one line of error
//! that says what came and what to do.

use std::collections::BTreeSet;
use std::fs;

use crate::cli::Room;

/// A network that trains in no time, and how.
const QUICK: &str = "--data-dir pics --net conv4-relu-pool-affine10 --batch-size 20 --epochs 1 --quiet";

/// Option, value, exit code, and what the error says; of `train` and `tune`, which share them.
const RECIPE: &[(&str, &str, i32, &[&str])] = &[
    ("--preset", "three-layers", 2, &["preset", "`three-layers`", "choose one of sprint"]),
    ("--config", "none.toml", 1, &["cannot read none.toml", "give the config.toml of a run"]),
    ("--config", "pics/test_batch.bin", 1, &["pics/test_batch.bin", "config.toml"]),
    ("--net", "conv4-rely-affine10", 2, &["character 7", "did you mean `relu`"]),
    ("--init", "gaussian", 2, &["`gaussian`", "write gaussian:STD"]),
    ("--init", "gaussian:-1", 2, &["deviation -1", "1e-3 and 1e-2 are usual"]),
    ("--epochs", "many", 2, &["'many'", "--epochs <N>", "give a number"]),
    ("--epochs", "-1", 2, &["-1 epochs", "give 1 or more"]),
    ("--epochs", "nan", 2, &["NaN epochs", "give 1 or more"]),
    ("--batch-size", "many", 2, &["--batch-size <IMAGES>", "give a whole number"]),
    ("--batch-size", "-1", 2, &["'-1'", "--batch-size <IMAGES>", "give a whole number from 0 up"]),
    ("--batch-size", "99999999999999999999", 2, &["--batch-size <IMAGES>", "number too large"]),
    ("--group", "weight", 2, &["`weight` has no `=`", "write SELECT=RULE"]),
    ("--group", "weight=sgd,lr=much", 2, &["`much`", "not a number", "write SELECT=RULE"]),
    ("--group", "weight=sgd,beta1=0.5", 2, &["`beta1=0.5` is no option of sgd", "write SELECT=RULE"]),
    ("--optimizer", "adams", 2, &["`adams`", "choose one of sgd, momentum"]),
    ("--learning-rate", "much", 2, &["--learning-rate <RATE>", "give a number"]),
    ("--learning-rate", "-1", 2, &["-1 is not a positive number", "1e-3 is usual"]),
    ("--learning-rate", "inf", 2, &["inf is not a positive number", "1e-3 is usual"]),
    ("--schedule", "exp", 2, &["`exp`", "exp:FACTOR"]),
    ("--schedule", "linear:soon", 2, &["`soon`", "not a number", "linear[:EPOCHS]"]),
    ("--warmup-epochs", "many", 2, &["--warmup-epochs <EPOCHS>", "give a number"]),
    ("--warmup-epochs", "-1", 2, &["-1 is not a number of epochs", "give 0 or more"]),
    ("--l2", "much", 2, &["--l2 <STRENGTH>", "give a number"]),
    ("--l2", "-1", 2, &["-1 is not a number from 0 up", "1e-3 is usual"]),
    ("--clip-norm", "much", 2, &["--clip-norm <NORM>", "give a number"]),
    ("--clip-norm", "0", 2, &["0 is not a positive number", "1 is usual"]),
    ("--ema", "much", 2, &["--ema <DECAY>", "give a number"]),
    ("--ema", "1", 2, &["a decay of 1", "0.99 averages"]),
    ("--keep", "worst", 2, &["'worst'", "--keep <WHICH>", "[possible values: best, last]"]),
    ("--sampler", "none", 2, &["--sampler <HOW>", "[possible values: shuffle, replacement]"]),
    ("--flip", "often", 2, &["'often'", "--flip[=<HOW>]", "[possible values: none, random, alternating]"]),
    ("--shift", "far", 2, &["--shift <PIXELS>", "give a whole number"]),
    ("--shift", "32", 2, &["shift by 32 pixels", "give less than 32"]),
    ("--shift-fill", "ones", 2, &["--shift-fill <WHAT>", "[possible values: zeros, reflect]"]),
    ("--cutout", "large", 2, &["--cutout <PIXELS>", "give a whole number"]),
    ("--cutout", "32", 2, &["cutout of 32 pixels", "give less than 32"]),
    ("--normalize", "no", 2, &["--normalize <HOW>", "[possible values: mean-image, per-channel]"]),
    ("--dtype", "f16", 2, &["--dtype <TYPE>", "[possible values: f32, f64]"]),
    ("--train-limit", "some", 2, &["--train-limit <N>", "give a whole number"]),
    ("--train-limit", "99", 2, &["99 of 98", "give 1 to 98"]),
    ("--image-size", "large", 2, &["--image-size <PIXELS>", "give a whole number"]),
    ("--image-size", "64", 2, &["pics holds CIFAR-10's", "leave it out"]),
    ("--run", "pics", 1, &["pics", "exists already", "another with --run"]),
    ("--run", "pics/test_batch.bin/run", 1, &["cannot create pics/test_batch.bin/run", "--run"]),
];

/// The whole command line, whose last option is the one with a bad value; exit code; what the error says.
const OTHERS: &[(&str, i32, &[&str])] = &[
    ("train --data-dir pics --resume none", 1, &["cannot read none/config.toml", "give the config.toml of a run"]),
    ("train --data-dir pics --stop-after soon", 2, &["--stop-after <EPOCH>", "give a number"]),
    ("train --data-dir pics --stop-after 0", 2, &["no epochs would be trained", "give more than 0"]),
    ("train --data-dir pics --checkpoints 0", 2, &["'0'", "--checkpoints <N>", "0 is not in 1.."]),
    ("train --data-dir pics --print-every often", 2, &["--print-every <N>", "give a whole number"]),
    ("train --data-dir pics --print-every 0", 2, &["print-every", "1 or more"]),
    ("tune --data-dir pics --resume none", 1, &["cannot read none/search.toml", "give the folder of a search"]),
    ("tune --data-dir pics --trials some", 2, &["--trials <N>", "give a"]),
    ("tune --data-dir pics --trials 0", 2, &["tune", "1 or more"]),
    ("tune --data-dir pics --vary l2", 2, &["`l2` has no `=`", "KEY=LOW..HIGH"]),
    ("tune --data-dir pics --target much", 2, &["--target <ACCURACY>", "give a number"]),
    ("tune --data-dir pics --target 65", 2, &["target", "0 to 1"]),
    ("tune --data-dir pics --target 0.5 --seeds no", 2, &["--seeds <N>", "give a"]),
    ("eval --checkpoint none", 1, &["cannot read none", "give the path of a file"]),
    ("eval --checkpoint pics/test_batch.bin", 1, &["pics/test_batch.bin: is not a checkpoint", "give a file"]),
    ("eval --split training", 2, &["--split <NAME>", "[possible values: validation, test, test-full]"]),
    ("eval --views 3", 2, &["--views <N>", "[possible values: 1, 2, 6]"]),
    ("eval --batch-size many", 2, &["--batch-size <IMAGES>", "give a whole number"]),
    ("eval --batch-size 0", 2, &["0 images", "give 1 or more"]),
    ("report runs/1 --out pics", 1, &["cannot write pics", "Is a directory", "choose a folder"]),
    ("report none", 1, &["cannot read none", "give the path"]),
    ("report pics", 1, &["cannot read pics/config.toml", "give the folder of a run"]),
    ("predict pics/test_batch.bin:20", 1, &["test_batch.bin", "no record 20", "0 to 19"]),
    ("predict pics/test_batch.bin:0 --checkpoint none", 1, &["cannot read none", "give the path of a file"]),
    ("export --checkpoint none", 1, &["cannot read none", "give the path of a file"]),
    ("export --format pickle", 2, &["--format <NAME>", "[possible values: onnx, npz]"]),
    ("export --out none/model.onnx", 1, &["cannot write none/model.onnx", "choose a folder that exists"]),
    ("export --out model.onnx --pixels --format npz", 2, &["--pixels with npz", "leave --pixels out"]),
    ("import none --net gap-affine3 --input 1x2x2", 1, &["cannot read none", "safetensors.torch.save_file"]),
    ("import weights --input 1x2x2 --net gap-afine3", 2, &["character 5", "did you mean `affine3`"]),
    ("import weights --net gap-affine3 --input 1x2", 2, &["--input <CxHxW>", "give channels, height and width"]),
    ("import weights --net gap-affine3 --input 1x0x2", 2, &["--input <CxHxW>", "give channels, height and width"]),
    (
        "import weights --net gap-affine3 --input 1x2x2 --map none.json",
        1,
        &["cannot read none.json", "a JSON file such"],
    ),
    (
        "import weights --net gap-affine3 --input 1x2x2 --map pics/test_batch.bin",
        1,
        &["test_batch.bin", "a JSON file such"],
    ),
    ("import weights --net gap-affine3 --input 1x2x2 --std 1 --mean a", 2, &["'a'", "--mean", "give a number"]),
    (
        "import weights --net gap-affine3 --input 1x2x2 --std 1,1 --mean 0,0",
        2,
        &["2 numbers for 1 channels", "one for each"],
    ),
    ("import weights --net gap-affine3 --input 1x2x2 --mean 0 --std a", 2, &["'a'", "--std", "give a number"]),
    ("import weights --net gap-affine3 --input 1x2x2 --mean 0 --std 0", 2, &["standard deviation of 0", "above 0"]),
    (
        "import weights --net gap-affine3 --input 1x2x2 --class-names none.txt",
        1,
        &["cannot read none.txt", "text file"],
    ),
    ("import weights --net gap-affine3 --input 1x2x2 --out none/m", 1, &["cannot write none/m", "choose a folder"]),
    ("bench --repeats some", 2, &["--repeats <N>", "give a whole number"]),
    ("bench --repeats 0", 2, &["0 runs", "give 1 or more"]),
    ("summary --net gap-", 2, &["network notation", "character"]),
    ("summary --preset none", 2, &["`none`", "choose one of"]),
    ("summary --net gap-affine3 --input 3", 2, &["--input <CxHxW>", "give channels, height and width"]),
    ("data fetch --data-dir new --mirror ftp://here", 2, &["`ftp://here`", "https://"]),
    ("data verify none", 1, &["none: 1 problem(s)", "mend them"]),
    ("data show pics --out none/sheet.png", 1, &["cannot write none/sheet.png", "choose a folder that exists"]),
    ("data show none", 1, &["none: there is no such folder", "give the folder"]),
    ("data pictures new --records some", 2, &["--records <N>", "give a whole number"]),
    ("data pictures new --records 0", 2, &["0 records", "1 or more"]),
    ("data pictures pics/test_batch.bin/new", 1, &["cannot write pics/test_batch.bin/new", "choose a folder"]),
];

/// Every command, with what it needs to be one.
const COMMANDS: [&str; 15] = [
    "train",
    "tune",
    "eval",
    "report runs/1",
    "predict pics/test_batch.bin:0",
    "export",
    "import weights --net gap-affine3 --input 1x2x2",
    "gradcheck",
    "bench",
    "summary",
    "data fetch",
    "data verify",
    "data show",
    "data pictures new",
    "doctor",
];

fn room() -> Room {
    let room = Room::new();
    room.run(&format!("train {QUICK}")).succeeds();
    // The `state_dict` of an affine layer: one channel, three classes.
    let header = br#"{"fc.weight":{"dtype":"F32","shape":[3,1],"data_offsets":[0,12]},"fc.bias":{"dtype":"F32","shape":[3],"data_offsets":[12,24]}}"#;
    let file = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 24]].concat();
    fs::write(room.path("weights"), file).unwrap();
    room
}

/// The options of a command that take a value, from its help.
fn options(room: &Room, command: &str) -> BTreeSet<String> {
    let help = room.run(&format!("{command} --help")).succeeds().stdout;
    let option = |line: &str| {
        let (name, rest) = line.trim_start().strip_prefix("--")?.split_once(['[', ' '])?;
        rest.trim_start_matches('=').starts_with('<').then(|| format!("--{name}"))
    };
    help.lines().filter_map(option).collect()
}

#[test]
fn every_option_refuses_what_is_no_value_of_it() {
    let room = room();
    let check = |args: &str, code: i32, parts: &[&str]| {
        let done = room.run(args);
        // What `data verify` has found is its result.
        let done = if args.starts_with("data verify") { done.without_result() } else { done };
        done.fails(code, parts);
    };
    let mut tried = BTreeSet::new();
    for command in ["train", "tune"] {
        for &(option, value, code, parts) in RECIPE {
            check(&format!("{command} --data-dir pics {option}={value}"), code, parts);
            tried.insert((command.to_owned(), option.to_owned()));
        }
    }
    for &(args, code, parts) in OTHERS {
        check(args, code, parts);
        let option = args.split(' ').rfind(|word| word.starts_with("--")).unwrap_or_default();
        tried.insert((first(args), option.to_owned()));
    }
    for command in COMMANDS {
        check(&format!("{command} --threads many"), 2, &["'many'", "--threads <N>", "give a whole number"]);
        check(&format!("{command} --threads 0"), 2, &["0 threads", "give 1 or more"]);
        check(&format!("{command} --seed -1"), 2, &["'-1'", "--seed <N>", "give a whole number from 0 up"]);
        for option in options(&room, &first(command)) {
            let global = ["--threads", "--seed", "--data-dir"].contains(&option.as_str());
            assert!(global || tried.contains(&(first(command), option.clone())), "{command} {option} was not tried");
        }
    }
    for command in ["train", "tune", "eval", "data verify", "data show", "data fetch"] {
        check(&format!("{command} --data-dir pics/test_batch.bin"), 1, &["pics/test_batch.bin"]);
    }
    for args in ["train --optimise 1", "trian", "predict", "report", "data verfy", "import weights"] {
        room.run(args).fails(2, &["'--help'"]);
    }
}

/// The words of a command, without its arguments.
fn first(command: &str) -> String {
    let words = if command.starts_with("data ") { 2 } else { 1 };
    command.split(' ').take(words).collect::<Vec<_>>().join(" ")
}

/// Each command that writes files, where no more than a kilobyte can be written, and where nothing can.
#[cfg(target_os = "linux")]
#[test]
fn what_cannot_be_written_is_one_line_and_what_was_there_stays() {
    let room = room();
    let limited = |args: &str| room.run_on_full_disk(args, 1);
    for (args, file) in [
        ("export --out file", "file"),
        ("export --format npz --out file", "file"),
        ("report runs/1 --out file", "file"),
        ("report runs/1 runs/1 --out file", "file"),
        ("data show pics --out file", "file"),
        ("data pictures new", "new"),
        ("import weights --net gap-affine3 --input 1x2x2 --out /proc/file", "/proc/file"),
        ("export --out /proc/file", "/proc/file"),
        ("report runs/1 --out /proc/file", "/proc/file"),
        ("data show pics --out /proc/file", "/proc/file"),
        ("data pictures /proc/new", "/proc/new"),
        ("data fetch --data-dir /proc/new", "/proc/new"),
    ] {
        fs::write(room.path("file"), "as it was").unwrap();
        let done = limited(args);
        done.fails(1, &[&format!("cannot write {file}: "), "(os error", "; choose a folder", "free space"]);
        assert!(!done.stderr.contains(".tmp"), "{args}: {}", done.stderr);
        assert_eq!(fs::read_to_string(room.path("file")).unwrap(), "as it was", "{args}");
        let left = fs::read_dir(room.path(".")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        assert_eq!(left.filter(|name| name.starts_with(".tmp")).count(), 0, "{args} leaves its pieces");
    }
    let tune = format!("tune {QUICK} --trials 2 --vary l2=0.1,0.01 --run full").replace(" --quiet", "");
    limited(&tune).without_result().fails(1, &["cannot write full/", "free some space", "--resume"]);
}
