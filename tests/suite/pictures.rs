//! The program on data of one's own: a folder of photos from training to prediction, other formats, and what it refuses.

use std::fs;
use std::path::Path;

use gemmnet::random::{Purpose, stream};
use image::{Rgb, RgbImage};
use rand::RngExt;
use serde_json::Value;

use super::cli::Room;

/// JPEG pictures of odd sizes in three classes: noise with bars that lie, stand, or both.
fn photos(dir: &Path, each: usize) {
    for (class, name) in ["both", "lying", "standing"].iter().enumerate() {
        fs::create_dir_all(dir.join(name)).unwrap();
        for index in 0..each {
            let mut rng = stream(class as u64, Purpose::Example, 7, index as u64);
            let (width, height) = (rng.random_range(20..60), rng.random_range(20..60));
            let [down, right] = [(); 2].map(|()| rng.random_range(0..8));
            let picture = RgbImage::from_fn(width, height, |x, y| {
                let bar = |at: u32, by: u32| ((at * 16 / width.min(height) + by) / 4).is_multiple_of(2);
                let bright = match class {
                    0 => bar(x, right) && bar(y, down),
                    1 => bar(y, down),
                    _ => bar(x, right),
                };
                Rgb([(); 3].map(|()| rng.random_range(0..60) + if bright { 150 } else { 20 }))
            });
            picture.save(dir.join(name).join(format!("{index}.jpg"))).unwrap();
        }
    }
}

fn room() -> Room {
    let room = Room::new();
    photos(&room.path("photos"), 40);
    room
}

#[test]
fn a_folder_of_photos_is_trained_on_measured_and_predicted() {
    let room = room();
    fs::write(room.path("photos/both/broken.jpg"), "broken").unwrap();
    let train = "train --data-dir photos --image-size 16 --epochs 3 --json";
    let first = room.run(train).succeeds();
    let report = first.object();
    for part in [
        "decoding 121 pictures",
        "1 of 121 pictures cannot be read and are left out: both/broken.jpg",
        "photos holds a folder of pictures for each class: 96 images for training, 12 for validation, 12 for tests, of 3x16x16 \
         in 3 classes",
        "recipe `own`, chosen by the data where nothing was said: --net '[conv64-bn-relu]x2-pool",
        "--flip=random --shift 1",
    ] {
        assert!(first.stderr.contains(part), "`{part}` is not in: {}", first.stderr);
    }
    assert_eq!((&report["data"], &report["preset"], &report["epochs"]), (&"folders".into(), &"own".into(), &3.into()));
    assert!(report["test_accuracy"].as_f64().unwrap() >= 0.75, "{report}");

    let again = room.run(train).succeeds();
    assert!(!again.stderr.contains("decoding"), "{}", again.stderr);
    assert!(again.stderr.contains("both/broken.jpg"), "what is left out is named each time: {}", again.stderr);
    assert_eq!(again.object()["val_accuracy"], report["val_accuracy"]);

    // The run says where its data is.
    let measured = room.json("eval");
    assert_eq!((&measured["accuracy"], &measured["images"]), (&report["test_accuracy"], &12.into()));
    assert_eq!(measured["class_names"], serde_json::json!(["both", "lying", "standing"]));

    // Any picture, of any size and format.
    let standing = image::open(room.path("photos/standing/3.jpg")).unwrap();
    standing.resize_exact(500, 400, image::imageops::FilterType::Triangle).save(room.path("large.webp")).unwrap();
    let predictions = room.json("predict photos/lying/0.jpg photos/lying/1.jpg photos/lying/2.jpg large.webp");
    let classes: Vec<&Value> =
        predictions["predictions"].as_array().unwrap().iter().map(|picture| &picture["classes"][0]["class"]).collect();
    assert!(
        classes[..3].iter().filter(|class| ***class == "lying").count() >= 2 && classes[3] == "standing",
        "{classes:?}"
    );
    room.run("predict photos/both/broken.jpg").fails(1, &["photos/both/broken.jpg", "no picture", "give a whole JPEG"]);

    let more = room.json("train --resume runs/2 --epochs 4");
    assert_eq!(more["val_accuracy"].as_array().unwrap().len(), 5);
    room.run("eval --data-dir pics").fails(1, &["pics", "3x32x32", "trained on 3x16x16"]);
    room.run(&format!("{train} --strict")).fails(1, &["both/broken.jpg", "no picture", "--strict"]);
}

#[test]
fn own_data_is_refused_in_one_line() {
    let room = room();
    for (args, code, parts) in [
        ("--image-size 4", 2, &["image size", "4x4", "give 8 to 4096"][..]),
        (
            "--preset sprint",
            2,
            &["10 scores", "3 classes", "end it with affine3: --net 'whiten3s2-", "-affine3b0-div128"],
        ),
        ("--net conv4-relu-affine4", 2, &["4 scores", "3 classes", "--net 'conv4-relu-affine3'"]),
        ("--net conv4-relu", 2, &["one score per class", "end it with"]),
        ("--net con4-affine3", 2, &["network notation", "did you mean `conv4`"]),
        ("--preset owns", 2, &["preset", "`owns`", "own"]),
    ] {
        let done = room.run(&format!("train --data-dir photos {args}"));
        done.fails(code, parts);
    }
    room.run("train --data-dir pics --image-size 16").fails(2, &["image-size", "pics", "CIFAR-10", "leave it out"]);
    fs::create_dir_all(room.path("bare")).unwrap();
    for command in ["train --data-dir bare", "data show bare"] {
        room.run(command).fails(1, &["bare", "no data that is known", "x_train.npy", "for each class"]);
    }
    let verify = room.run("data verify bare");
    assert!(verify.code == Some(1) && verify.stdout.contains("no data that is known"), "{}", verify.stdout);
    room.run("data show photos --out no/sheet.png").fails(1, &["no/sheet.png", "can be written"]);
    assert_eq!(room.run("summary --input 3x64").code, Some(2));
    // Where nothing can be kept, pictures are decoded each time.
    fs::remove_dir_all(room.path("cache")).unwrap();
    fs::write(room.path("cache"), "in the way").unwrap();
    let done = room.run("train --data-dir photos --image-size 8 --epochs 0.1 --net conv2-gap-affine3").succeeds();
    assert!(done.stderr.contains("cannot be written, so pictures are decoded anew"), "{}", done.stderr);
}

#[test]
fn data_verify_and_show_know_every_format() {
    let room = room();
    fs::write(room.path("photos/both/broken.jpg"), "broken").unwrap();
    for index in 0..20 {
        fs::remove_file(room.path("photos/lying").join(format!("{}.jpg", index + 13))).unwrap();
    }
    for index in 0..10 {
        fs::remove_file(room.path("photos/lying").join(format!("{index}.jpg"))).unwrap();
    }
    let verify = room.run("data verify photos");
    assert_eq!(verify.code, Some(1));
    for part in ["both: 40 pictures", "lying: 10 pictures", "both/broken.jpg: is no picture"] {
        assert!(verify.stdout.contains(part), "{}", verify.stdout);
    }
    assert!(verify.stderr.contains("1 problem(s)") && verify.stderr.contains("leaves them out"), "{}", verify.stderr);
    fs::remove_file(room.path("photos/both/broken.jpg")).unwrap();
    let verify = room.json("data verify photos");
    assert_eq!(verify["classes"], serde_json::json!({ "both": 40, "lying": 10, "standing": 40 }));

    let show = room.run("data show photos --json").succeeds();
    assert!(show.stderr.contains("from 8 (lying) to 32 (both) training images"), "imbalance: {}", show.stderr);
    let sheet = image::open(room.path("contact-sheet.png")).unwrap().to_rgb8();
    let object = show.object();
    assert_eq!((&object["width"], &object["height"]), (&sheet.width().into(), &sheet.height().into()));
    assert_eq!(object["classes"]["standing"], 40);
    // Three rows with black letters at the left and pictures, which are neither black nor white, at the right.
    let row = (sheet.height() - 4) / 3;
    for class in 0..3 {
        let top = class * row;
        let count = |from: u32, to: u32, is: &dyn Fn([u8; 3]) -> bool| {
            (from..to)
                .flat_map(|x| (top..top + row).map(move |y| (x, y)))
                .filter(|&(x, y)| is(sheet.get_pixel(x, y).0))
                .count()
        };
        assert!(count(0, 76, &|pixel| pixel == [0; 3]) > 100, "letters of row {class}");
        let wide = sheet.width() - 140;
        assert!(
            count(140, sheet.width(), &|pixel| pixel != [255; 3]) > (wide * row / 2) as usize,
            "pictures of {class}"
        );
    }
    assert!(room.run("doctor --data-dir photos").succeeds().stdout.contains("90 whole pictures in 3 classes"));

    // CIFAR-10's files, and IDX.
    assert_eq!(room.json("data show pics --out pics.png")["classes"].as_object().unwrap().len(), 10);
    let idx = room.path("digits");
    fs::create_dir(&idx).unwrap();
    let header = |magic: u32, sizes: &[u32]| -> Vec<u8> {
        [&[magic][..], sizes].concat().iter().flat_map(|n| n.to_be_bytes()).collect()
    };
    // 60 images of 8x8 pixels: class 0 is dark, class 1 bright.
    let pixels = (0..60 * 64).map(|i| (i * 7 % 90 + i / 64 % 2 * 150) as u8);
    fs::write(
        idx.join("train-images-idx3-ubyte"),
        header(0x803, &[60, 8, 8]).into_iter().chain(pixels).collect::<Vec<_>>(),
    )
    .unwrap();
    fs::write(
        idx.join("train-labels-idx1-ubyte"),
        header(0x801, &[60]).into_iter().chain((0..60).map(|i| i % 2)).collect::<Vec<_>>(),
    )
    .unwrap();
    let verify = room.json("data verify digits");
    assert_eq!((&verify["train"], &verify["validation"], &verify["test"]), (&48.into(), &6.into(), &6.into()));
    room.run("data show digits").succeeds();
    let trained = room.run("train --data-dir digits --epochs 10 --json").succeeds();
    assert!(trained.stderr.contains("IDX files") && trained.stderr.contains("--flip=none"), "{}", trained.stderr);
    assert_eq!((&trained.object()["data"], &trained.object()["test_accuracy"]), (&"idx".into(), &1.0.into()));
    fs::write(idx.join("train-labels-idx1-ubyte"), "short").unwrap();
    let broken = room.run("data verify digits");
    assert!(broken.code == Some(1) && broken.stdout.contains("too few for a header"), "{}", broken.stdout);
}

/// Without images for tests there is no accuracy on them, and `eval` takes what is held out for validation.
#[test]
fn data_without_tests_is_measured_on_validation() {
    let room = room();
    for part in ["train", "val"] {
        fs::create_dir_all(room.path("parted").join(part)).unwrap();
    }
    fs::rename(room.path("photos"), room.path("parted/train"))
        .or_else(|_| {
            fs::remove_dir(room.path("parted/train"))?;
            fs::rename(room.path("photos"), room.path("parted/train"))
        })
        .unwrap();
    photos(&room.path("parted/val"), 4);
    let report = room.json("train --data-dir parted --image-size 8 --epochs 1 --net conv4-gap-affine3");
    assert_eq!((&report["test_accuracy"], &report["test_1000_accuracy"]), (&Value::Null, &Value::Null));
    let measured = room.json("eval --data-dir parted");
    assert_eq!((&measured["split"], &measured["images"]), (&"validation".into(), &12.into()));
    assert_eq!(measured["accuracy"], report["kept_val_accuracy"]);
    room.run("eval --data-dir parted --split test").fails(2, &["test split", "0 images"]);
}

#[test]
fn summary_takes_images_of_any_size() {
    let room = Room::new();
    let summary = room.json("summary --net conv4s2-gap-affine7 --input 1x20x30");
    assert_eq!(summary["input"], serde_json::json!([1, 20, 30]));
    assert_eq!(summary["parameters"], 4 * 9 + 4 + 4 * 7 + 7);
    assert!(room.run("summary --preset own --input 3x64x64").succeeds().stdout.contains("3x64x64 input"));
}
