//! CIFAR-10's reader against broken and real files, its splits, normalisation and augmentation, and the pictures.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gemmnet::data::cifar10::{self, DIM, FOLDER, NAMES, PIXELS, RECORD, SIDE, TEST_BATCH, TRAIN_BATCHES};
use gemmnet::data::pictures::{self, Pictures, write_pictures};
use gemmnet::data::{Batches, Cifar10, Dataset, Draw, Image, Normalization, Normalizer, Sampler, Source, Split};
use gemmnet::parallel::with_threads;
use gemmnet::random::{Purpose, stream};
use ndarray::{Array2, Array4, Axis};
use rand::Rng;
use tempfile::TempDir;

/// Random records, labels in turn from 0 to 9.
fn random_records(count: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; count * RECORD];
    stream(seed, Purpose::Example, 0, 0).fill_bytes(&mut bytes);
    bytes.chunks_exact_mut(RECORD).enumerate().for_each(|(i, record)| record[0] = (i % 10) as u8);
    bytes
}

/// A folder with `counts` records in its five training batches, and 30 test records.
fn folder(counts: [usize; 5]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (i, (name, count)) in TRAIN_BATCHES.into_iter().zip(counts).enumerate() {
        fs::write(dir.path().join(name), random_records(count, i as u64)).unwrap();
    }
    fs::write(dir.path().join(TEST_BATCH), random_records(30, 9)).unwrap();
    dir
}

fn open(dir: &TempDir) -> Dataset {
    Dataset::open(dir.path(), Normalization::MeanImage).unwrap()
}

/// Bytes and label of an image.
fn record(data: &Dataset, split: Split, index: usize) -> (&[u8], usize) {
    match data.image(split, index) {
        (Image::Bytes(pixels), label) => (pixels, label),
        (Image::Floats(_), _) => panic!("CIFAR-10 is bytes"),
    }
}

/// An error message says all of this, in one line.
fn assert_names(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    assert!(!message.contains('\n'), "an error is one line: {message}");
}

#[test]
fn broken_folders_are_described() {
    type Break = fn(&Path);
    let cases: [(Break, &[&str]); 9] = [
        (
            |dir| fs::write(dir.join(TRAIN_BATCHES[1]), &random_records(3, 0)[..2 * RECORD + 100]).unwrap(),
            &["data_batch_2.bin", "2 records", "100 bytes over", "truncated", "gemmnet data fetch"],
        ),
        (
            |dir| {
                let mut bytes = random_records(5, 0);
                bytes[3 * RECORD] = 12;
                bytes[4 * RECORD] = 255;
                fs::write(dir.join(TEST_BATCH), bytes).unwrap();
            },
            &["test_batch.bin", "record 3 has label 12", "0 to 9", "1 more"],
        ),
        (
            |dir| {
                fs::remove_file(dir.join(TRAIN_BATCHES[2])).unwrap();
                fs::remove_file(dir.join(TEST_BATCH)).unwrap();
            },
            &["data_batch_3.bin, test_batch.bin missing", "gemmnet data fetch"],
        ),
        (|dir| fs::write(dir.join(TRAIN_BATCHES[0]), []).unwrap(), &["data_batch_1.bin: is empty"]),
        (
            |dir| {
                fs::remove_file(dir.join(TRAIN_BATCHES[4])).unwrap();
                fs::create_dir(dir.join(TRAIN_BATCHES[4])).unwrap();
            },
            &["data_batch_5.bin: is a folder"],
        ),
        (
            |dir| fs::read_dir(dir).unwrap().for_each(|entry| fs::remove_file(entry.unwrap().path()).unwrap()),
            &["none of CIFAR-10's six", "gemmnet data fetch"],
        ),
        (
            |dir| {
                fs::read_dir(dir).unwrap().for_each(|entry| fs::remove_file(entry.unwrap().path()).unwrap());
                fs::write(dir.join("data_batch_1"), []).unwrap();
            },
            &["Python version"],
        ),
        (|dir| fs::remove_dir_all(dir).unwrap(), &["no such folder"]),
        (
            |dir| {
                fs::remove_dir_all(dir).unwrap();
                fs::write(dir, "the archive, say").unwrap();
            },
            &["is not a folder"],
        ),
    ];
    for (break_it, parts) in cases {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("set");
        fs::rename(folder([10; 5]).keep(), &dir).unwrap();
        assert!(Cifar10::open(&dir).is_ok());
        break_it(&dir);
        assert_names(&Cifar10::open(&dir).unwrap_err().to_string(), parts);
    }
}

#[cfg(unix)]
#[test]
fn files_that_cannot_be_read_are_described() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let dir = folder([10; 5]);
    let batch = dir.path().join(TRAIN_BATCHES[3]);
    fs::set_permissions(&batch, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::File::open(&batch).is_ok() {
        eprintln!("skipped in part: this user may read any file");
    } else {
        assert_names(
            &Cifar10::open(dir.path()).unwrap_err().to_string(),
            &["cannot read", "data_batch_4.bin", "permissions"],
        );
    }
    fs::remove_file(&batch).unwrap();
    symlink(dir.path().join("nowhere"), &batch).unwrap();
    assert_names(&Cifar10::open(dir.path()).unwrap_err().to_string(), &["cannot read", "data_batch_4.bin"]);
    fs::remove_file(&batch).unwrap();
    symlink("/dev/null", &batch).unwrap();
    assert_names(&Cifar10::open(dir.path()).unwrap_err().to_string(), &["data_batch_4.bin: is not a regular file"]);
}

#[test]
fn verify_lists_every_problem() {
    let dir = folder([10; 5]);
    let report = cifar10::verify(dir.path());
    assert!(report.problems.is_empty() && !report.has_official_size());
    assert_eq!(report.batches.len(), 6);
    assert_eq!(report.batches[5], (TEST_BATCH, 30));

    fs::remove_file(dir.path().join(TRAIN_BATCHES[0])).unwrap();
    let mut bytes = random_records(2, 0);
    bytes[RECORD] = 10;
    bytes.push(0);
    fs::write(dir.path().join(TRAIN_BATCHES[1]), bytes).unwrap();
    fs::write(dir.path().join(TEST_BATCH), []).unwrap();
    let report = cifar10::verify(dir.path());
    let problems: Vec<_> = report.problems.iter().map(ToString::to_string).collect();
    assert_eq!(problems.len(), 4, "{problems:#?}");
    for (problem, part) in problems.iter().zip(["data_batch_1.bin missing", "truncated", "label 10", "is empty"]) {
        assert_names(problem, &[part]);
    }
    assert_eq!(report.batches.len(), 3);
}

#[test]
fn batches_are_found_in_the_archives_own_folder_with_their_names() {
    let root = tempfile::tempdir().unwrap();
    fs::rename(folder([10; 5]).keep(), root.path().join(FOLDER)).unwrap();
    assert!(cifar10::looks_like_cifar10(root.path()));
    let files = Cifar10::open(root.path()).unwrap();
    assert_eq!(files.dir(), root.path().join(FOLDER));
    assert_eq!(files.class_names()[..2], ["airplane", "automobile"]);
    let names: String = (0..10).map(|i| format!("kind {i}\n")).collect();
    fs::write(root.path().join(FOLDER).join(NAMES), names + "\n").unwrap();
    assert_eq!(Cifar10::open(root.path()).unwrap().class_names()[9], "kind 9");
}

/// The real files, if this machine has them: byte for byte, or all records through the same splits as in CS231n.
#[test]
fn real_records_are_read_exactly() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/cifar10/exact-sample");
    let dir = std::env::var_os("GEMMNET_TEST_CIFAR_SAMPLE").map_or(beside, PathBuf::from);
    if !dir.is_dir() {
        eprintln!("skipped: no real records in {}; set GEMMNET_TEST_CIFAR_SAMPLE", dir.display());
        return;
    }
    let files = Cifar10::open(&dir).unwrap();
    let (pixels, label) = files.train()[0].get(0);
    assert_eq!((label, &pixels[..6]), (6, &[59, 43, 50, 68, 98, 119][..]));
    for (records, name) in files.train().iter().chain([files.test()]).zip(TRAIN_BATCHES.iter().chain([&TEST_BATCH])) {
        let bytes = fs::read(dir.join(name)).unwrap();
        assert_eq!(bytes.len(), records.len() * RECORD);
        for (i, record) in bytes.chunks_exact(RECORD).enumerate() {
            let (pixels, label) = records.get(i);
            assert!(label == record[0] && pixels[..] == record[1..], "{name}, record {i}");
        }
    }
    assert_eq!(files.class_names()[6], "frog");
}

#[test]
fn splits_follow_cs231ns_proportions() {
    for (counts, train, validation) in
        [([100; 5], 490, 10), ([45, 1, 1, 1, 1], 48, 1), ([1; 5], 4, 1), ([75, 1, 72, 1, 1], 147, 3)]
    {
        let data = open(&folder(counts));
        assert_eq!((data.len(Split::Train), data.len(Split::Validation)), (train, validation));
        let notes = data.notes();
        assert!(notes[0].contains(&format!("the last 2 % ({validation})")) && notes.len() == 1, "{notes:?}");
    }
    let dir = folder([20, 30, 10, 25, 15]);
    let data = open(&dir);
    let all: Vec<u8> = TRAIN_BATCHES.iter().flat_map(|name| fs::read(dir.path().join(name)).unwrap()).collect();
    let all: Vec<_> = all.chunks_exact(RECORD).collect();
    for i in 0..100 {
        let (pixels, label) =
            if i < 98 { record(&data, Split::Train, i) } else { record(&data, Split::Validation, i - 98) };
        assert!(pixels == &all[i][1..] && label == usize::from(all[i][0]), "record {i}");
    }
    assert_eq!(data.len(Split::Test), 30);
    assert_eq!((data.dim(), data.image_len(), data.classes()), (DIM, PIXELS, 10));

    let dir = folder([10_000; 5]);
    fs::write(dir.path().join(TEST_BATCH), random_records(10_000, 9)).unwrap();
    assert!(cifar10::verify(dir.path()).has_official_size());
    let data = open(&dir);
    assert_eq!(Split::ALL.map(|split| data.len(split)), [49_000, 1_000, 10_000]);
    assert!(data.notes().is_empty());
    let small = data.clone().limit(Split::Test, 1_000).unwrap();
    assert_eq!(Split::ALL.map(|split| small.len(split)), [49_000, 1_000, 1_000]);
    assert_eq!(record(&small, Split::Test, 999), record(&data, Split::Test, 999));
}

#[test]
fn the_mean_image_is_that_of_the_training_split() {
    let dir = folder([1000, 900, 700, 100, 300]);
    let data = with_threads(1, || open(&dir)).unwrap();
    let n = data.len(Split::Train);
    for pixel in [0, 1, 1023, 1024, 3071] {
        let sum: u64 = (0..n).map(|i| u64::from(record(&data, Split::Train, i).0[pixel])).sum();
        assert_eq!(data.normalizer().mean()[pixel], (sum as f64 / n as f64) as f32, "pixel {pixel}");
    }
    assert_eq!(data.normalizer().scale(), [1.0; 3]);
    let again = with_threads(3, || open(&dir)).unwrap();
    assert_eq!(data.normalizer(), again.normalizer());
    let limited = again.limit(Split::Train, 7).unwrap();
    assert_eq!((limited.len(Split::Train), limited.normalizer()), (7, data.normalizer()));
    for wrong in [0, 8] {
        assert_names(
            &limited.clone().limit(Split::Train, wrong).unwrap_err().to_string(),
            &[&format!("{wrong} of 7"), "1 to 7"],
        );
    }
}

#[test]
fn per_channel_normalisation_gives_mean_0_and_variance_1() {
    let dir = folder([40; 5]);
    let data = Dataset::open(dir.path(), Normalization::PerChannel).unwrap();
    let n = data.len(Split::Train);
    let (mut x, mut y) = (vec![0_f64; n * PIXELS], vec![0; n]);
    data.fill_batch(Draw::plain(Split::Train), &(0..n).collect::<Vec<_>>(), &mut x, &mut y).unwrap();
    for channel in 0..3 {
        let values = || x.chunks_exact(PIXELS).flat_map(|image| &image[channel * 1024..][..1024]);
        let count = values().count() as f64;
        let mean = values().sum::<f64>() / count;
        let variance = values().map(|v| v * v).sum::<f64>() / count - mean * mean;
        assert!(mean.abs() < 1e-5 && (variance - 1.0).abs() < 1e-5, "channel {channel}: {mean}, {variance}");
    }
    // Pictures without contrast have no standard deviation to divide by.
    let flat = Array4::from_elem((2, 3, SIDE, SIDE), 7_u8);
    let flat = (flat.view(), &[0_u8, 1][..]);
    let data = Dataset::from_arrays(flat, flat, flat, Normalization::PerChannel).unwrap();
    let mut x = vec![f32::NAN; PIXELS];
    data.fill_batch(Draw::plain(Split::Train), &[1], &mut x, &mut [0]).unwrap();
    assert!(x.iter().all(|&v| v == 0.0));
}

#[test]
fn a_checkpoints_normaliser_is_used_as_it_is() {
    let data = open(&folder([10; 5]));
    let normalizer = Normalizer::new(DIM, vec![100.0; PIXELS], vec![1.0, 0.5, 2.0]).unwrap();
    let data = data.with_normalizer(normalizer.clone()).unwrap();
    let (mut x, mut y) = (vec![0_f32; 2 * PIXELS], [0; 2]);
    data.fill_batch(Draw::plain(Split::Test), &[4, 29], &mut x, &mut y).unwrap();
    assert_eq!(y, [4, 9]);
    for (image, index) in x.chunks_exact(PIXELS).zip([4, 29]) {
        let (pixels, _) = record(&data, Split::Test, index);
        for (i, (&value, &pixel)) in image.iter().zip(pixels).enumerate() {
            assert_eq!(value, (f32::from(pixel) - 100.0) * [1.0, 0.5, 2.0][i / 1024]);
        }
        let mut alone = vec![0_f32; PIXELS];
        normalizer.apply(Image::Bytes(pixels), &mut alone).unwrap();
        assert_eq!(alone, image);
    }
}

#[test]
fn pictures_are_cifar10_files_from_a_seed() {
    let root = tempfile::tempdir().unwrap();
    let dirs = ["one", "same", "other"].map(|name| root.path().join(name));
    with_threads(1, || write_pictures(&dirs[0], 5, 40)).unwrap().unwrap();
    with_threads(3, || write_pictures(&dirs[1], 5, 40)).unwrap().unwrap();
    write_pictures(&dirs[2], 6, 40).unwrap();
    let read = |dir: &PathBuf, name: &str| fs::read(dir.join(name)).unwrap();
    for name in TRAIN_BATCHES.into_iter().chain([TEST_BATCH]) {
        assert_eq!(read(&dirs[0], name), read(&dirs[1], name), "{name}");
        assert_ne!(read(&dirs[0], name), read(&dirs[2], name), "{name}");
    }
    assert_ne!(read(&dirs[0], TRAIN_BATCHES[0]), read(&dirs[0], TRAIN_BATCHES[1]));
    assert_eq!(fs::read_dir(&dirs[0]).unwrap().count(), 7, "nothing is left over");
    let files = Cifar10::open(&dirs[0]).unwrap();
    assert_eq!(files.class_names(), pictures::CLASS_NAMES);
    assert_eq!(files.test().len(), 40);

    // In memory they are the same.
    let (written, drawn) = (&files, Pictures::draw(5, 40).unwrap());
    assert_eq!((drawn.dim(), drawn.class_names()), (written.dim(), written.class_names()));
    for split in Split::ALL {
        assert_eq!(drawn.len(split), written.len(split));
        (0..drawn.len(split)).for_each(|i| assert_eq!(drawn.image(split, i), written.image(split, i), "{split:?} {i}"));
    }
    assert_names(&Pictures::draw(5, 0).unwrap_err().to_string(), &["0 records"]);

    // A set of ours is replaced, anything else is left alone.
    write_pictures(&dirs[0], 6, 30).unwrap();
    assert_eq!(Cifar10::open(&dirs[0]).unwrap().test().len(), 30);
    let foreign = folder([10; 5]);
    let before = read(&foreign.path().to_path_buf(), TEST_BATCH);
    assert_names(&write_pictures(foreign.path(), 0, 10).unwrap_err().to_string(), &["already holds", "another folder"]);
    assert_eq!(read(&foreign.path().to_path_buf(), TEST_BATCH), before);

    assert_names(&write_pictures(&dirs[0], 0, 0).unwrap_err().to_string(), &["0 records"]);
    fs::write(root.path().join("file"), []).unwrap();
    let below_a_file = root.path().join("file").join("set");
    assert_names(&write_pictures(&below_a_file, 0, 10).unwrap_err().to_string(), &["cannot write", "MB of free space"]);
}

/// Softmax regression on the mean-subtracted pixels, by gradient descent on batches of 100, with a learning rate at which
/// it converges: it learns something, and far from everything.
#[test]
fn a_linear_classifier_cannot_solve_the_pictures() {
    let pictures = Pictures::draw(0, pictures::DEFAULT_RECORDS).unwrap();
    let data = Dataset::new(Arc::new(pictures), Normalization::MeanImage).unwrap();
    let load = |split: Split| {
        let n = data.len(split);
        let (mut x, mut y) = (Array2::<f32>::zeros((n, PIXELS)), vec![0; n]);
        let all: Vec<_> = (0..n).collect();
        data.fill_batch(Draw::plain(split), &all, x.as_slice_mut().unwrap(), &mut y).unwrap();
        (x / 64.0, y)
    };
    let (train, test) = (load(Split::Train), load(Split::Test));
    let (mut w, mut b) = (Array2::<f32>::zeros((PIXELS, 10)), Array2::<f32>::zeros((1, 10)));
    let accuracy = |(x, y): &(Array2<f32>, Vec<usize>), w: &Array2<f32>, b: &Array2<f32>| {
        let scores = x.dot(w) + b;
        let right = scores.outer_iter().zip(y).filter(|(row, label)| row.iter().all(|&score| score <= row[**label]));
        right.count() as f64 / y.len() as f64
    };
    let mut order = Vec::new();
    for epoch in 0..15 {
        let batches = Batches::new(train.1.len(), 100).unwrap();
        Sampler::ShuffledEpochs.order(batches, 0, epoch, &mut order);
        for indices in order.chunks_exact(batches.size) {
            let x = train.0.select(Axis(0), indices);
            let mut scores = x.dot(&w) + &b;
            for (mut row, &index) in scores.outer_iter_mut().zip(indices) {
                let largest = row.fold(f32::NEG_INFINITY, |a, &v| a.max(v));
                row.mapv_inplace(|score| (score - largest).exp());
                row /= row.sum();
                row[train.1[index]] -= 1.0;
            }
            let step = 1e-3 / batches.size as f32;
            w.scaled_add(-step, &x.t().dot(&scores));
            b.scaled_add(-step, &scores.sum_axis(Axis(0)).insert_axis(Axis(0)));
        }
    }
    let (seen, unseen) = (accuracy(&train, &w, &b), accuracy(&test, &w, &b));
    println!("linear classifier: {seen:.3} of the training pictures, {unseen:.3} of the test pictures");
    assert!(seen > 0.2, "it has not learnt: {seen}");
    assert!(unseen > 0.15 && unseen < 0.6, "{unseen}");
}
