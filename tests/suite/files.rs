//! Data sets in files, made here to their specifications: what is read, what is refused, and that nothing is decoded twice.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use gemmnet::data::files::folder::{Options, Progress};
use gemmnet::data::files::{Format, Stored, arrays, cifar100, decode, folder, idx};
use gemmnet::data::{Image, Source, Split};
use gemmnet::parallel::with_threads;
use gemmnet::{Error, Result};
use image::{GrayImage, Luma, Rgb, RgbImage};
use ndarray::{Array, Array1, Array4, Dimension, ShapeBuilder};
use ndarray_npy::{ReadNpyExt, WritableElement, WriteNpyExt};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// An error message says all of this, in one line.
#[track_caller]
fn assert_refused<T>(result: Result<T>, parts: &[&str]) {
    let message = result.err().expect("an error").to_string();
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    assert!(!message.contains('\n'), "an error is one line: {message}");
}

fn bytes(source: &dyn Source, split: Split, index: usize) -> (Vec<u8>, usize) {
    let (Image::Bytes(pixels), label) = source.image(split, index) else { panic!("bytes") };
    (pixels.to_vec(), label)
}

fn lens(source: &dyn Source) -> [usize; 3] {
    Split::ALL.map(|split| source.len(split))
}

/// A folder of pictures, and one to keep them in.
struct Photos {
    root: TempDir,
}

impl Photos {
    fn new() -> Self {
        Photos { root: tempfile::tempdir().unwrap() }
    }

    fn dir(&self) -> PathBuf {
        self.root.path().join("photos")
    }

    fn cache(&self) -> PathBuf {
        self.root.path().join("cache")
    }

    /// A picture of one colour.
    fn add(&self, path: &str, (width, height): (u32, u32), colour: [u8; 3]) {
        let path = self.dir().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        RgbImage::from_pixel(width, height, Rgb(colour)).save(path).unwrap();
    }

    fn write(&self, path: &str, bytes: &[u8]) {
        let path = self.dir().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// Opens them; whether they were decoded.
    fn open(&self, size: Option<usize>, strict: bool) -> Result<(Stored, bool)> {
        let mut last = None;
        let options = Options { size: size.map(|side| [side; 2]), strict };
        let stored = folder::open(&self.dir(), options, &self.cache(), &mut |progress| last = Some(progress))?;
        if let Some(Progress { done, total }) = last {
            assert_eq!(done, total);
        }
        Ok((stored, last.is_some()))
    }

    fn refused(&self, parts: &[&str]) {
        assert_refused(self.open(Some(8), false), parts);
    }
}

/// 12 red, 11 green and 10 blue pictures in three classes.
fn coloured() -> Photos {
    let photos = Photos::new();
    for i in 0..12 {
        photos.add(&format!("Rot/{i:02}.png"), (20 + i, 30), [250, 0, 0]);
    }
    for i in 0..11 {
        photos.add(&format!("grün/deep/er/{i:02}.PNG"), (40, 20 + i), [0, 250, 0]);
    }
    for i in 0..10 {
        photos.add(&format!("blau/{i:02}.bmp"), (20, 20), [0, 0, 250]);
    }
    photos
}

#[test]
fn a_folder_for_each_class_is_read_as_imagefolder_does() {
    let photos = coloured();
    photos.write("blau/notes.txt", b"about blue");
    photos.write(".hidden/picture.png", b"of a program");
    assert_eq!(Format::of(&photos.dir()).unwrap(), Format::Pictures);
    let (stored, decoded) = photos.open(Some(8), false).unwrap();
    assert!(decoded);
    assert_eq!(stored.class_names(), ["Rot", "blau", "grün"], "sorted by code point");
    assert_eq!(stored.dim(), [3, 8, 8]);
    assert_eq!(lens(&stored), [33 - 5 - 3, 2 + 2 + 1, 3], "a tenth of each class for validation and for tests");
    for split in Split::ALL {
        for index in 0..stored.len(split) {
            let (pixels, label) = bytes(&stored, split, index);
            let channel = [0, 2, 1][label];
            assert!(pixels.iter().enumerate().all(|(i, &pixel)| pixel == if i / 64 == channel { 250 } else { 0 }));
        }
    }
    assert!(stored.notes()[0].contains("1 file(s) are left out") && stored.notes()[0].contains("notes.txt"));
    assert_eq!(stored.notes().len(), 1);
}

/// The folder in which the arrays are kept.
fn kept(photos: &Photos) -> Vec<PathBuf> {
    let outer = fs::read_dir(photos.cache()).unwrap().map(|entry| entry.unwrap().path());
    outer.flat_map(|outer| fs::read_dir(outer).unwrap().map(|entry| entry.unwrap().path())).collect()
}

#[test]
fn pictures_are_decoded_once_and_anew_when_one_changes() {
    let photos = coloured();
    let all = |stored: &Stored| -> Vec<_> {
        Split::ALL.iter().flat_map(|&split| (0..stored.len(split)).map(move |i| bytes(stored, split, i))).collect()
    };
    let (first, _) = with_threads(1, || photos.open(Some(8), false)).unwrap().unwrap();
    let (again, decoded) = photos.open(Some(8), false).unwrap();
    assert!(!decoded);
    assert_eq!(all(&first), all(&again));

    // What is kept is what others read too.
    let folder = kept(&photos).pop().unwrap();
    let images = Array4::<u8>::read_npy(fs::File::open(folder.join("images.npy")).unwrap()).unwrap();
    let labels = Array1::<i64>::read_npy(fs::File::open(folder.join("labels.npy")).unwrap()).unwrap();
    assert_eq!((images.shape(), labels.len()), (&[33, 3, 8, 8][..], 33));
    assert!(labels.iter().zip(images.outer_iter()).all(|(&l, image)| image[[[0, 2, 1][l as usize], 3, 4]] == 250));
    let meta: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("meta.json")).unwrap()).unwrap();
    assert_eq!((&meta["classes"][2], &meta["dim"]), (&"grün".into(), &serde_json::json!([3, 8, 8])));

    // On three threads from nothing: the same bits.
    fs::remove_dir_all(photos.cache()).unwrap();
    let (other, decoded) = with_threads(3, || photos.open(Some(8), false)).unwrap().unwrap();
    assert!(decoded);
    assert_eq!(all(&first), all(&other));

    photos.add("blau/00.bmp", (21, 20), [0, 0, 251]);
    let (_, decoded) = photos.open(Some(8), false).unwrap();
    assert!(decoded, "a picture changed");
    let now = kept(&photos);
    assert!(now.len() == 1 && now[0] != folder, "what was kept before is gone: {now:?}");
    photos.open(Some(9), false).unwrap();
    assert_eq!(kept(&photos).len(), 2, "other sizes are kept apart");

    // Damaged, and so made anew.
    let path = now[0].join("images.npy");
    for damage in [100, 3000] {
        fs::write(&path, &fs::read(&path).unwrap()[..damage]).unwrap();
        let (stored, decoded) = photos.open(Some(8), false).unwrap();
        assert!(decoded);
        assert_eq!(lens(&stored), lens(&first));
    }
    fs::remove_file(now[0].join("labels.npy")).unwrap();
    assert!(photos.open(Some(8), false).unwrap().1);
    let path = now[0].join("meta.json");
    fs::write(&path, "{").unwrap();
    assert!(photos.open(Some(8), false).unwrap().1);
    // Pictures that are not there: see fuzz/fuzz_targets/kept.rs.
    let whole = fs::read_to_string(&path).unwrap();
    for strict in [false, true] {
        let broken = r#""broken": [{"index": 99, "problem": "none"}]"#;
        fs::write(&path, whole.replace(r#""broken": []"#, broken)).unwrap();
        assert_ne!(fs::read_to_string(&path).unwrap(), whole);
        assert!(photos.open(Some(8), strict).unwrap().1);
    }
}

/// Which pictures are held out depends on their names: one more moves at most one in each split of its class.
#[test]
fn a_new_picture_leaves_the_splits_alone() {
    let photos = Photos::new();
    for i in 0..40_u8 {
        photos.add(&format!("a/{i}.png"), (8, 8), [i; 3]);
    }
    let values = |split| -> Vec<u8> {
        let (stored, _) = photos.open(Some(8), false).unwrap();
        (0..stored.len(split)).map(|i| bytes(&stored, split, i).0[0]).collect()
    };
    let [validation, test] = [Split::Validation, Split::Test].map(values);
    assert_eq!((validation.len(), test.len()), (4, 4));
    assert!(validation.iter().all(|value| !test.contains(value)));
    photos.add("a/new.png", (8, 8), [200; 3]);
    let again = values(Split::Validation);
    assert!(validation.iter().filter(|value| !again.contains(value)).count() <= 1, "{validation:?} {again:?}");
}

#[test]
fn folders_of_splits_are_taken_as_they_are() {
    let photos = Photos::new();
    for (path, value) in [("train/a/1", 10), ("train/a/2", 11), ("train/b/1", 20), ("val/b/1", 30), ("test/a/1", 40)] {
        photos.add(&format!("{path}.png"), (9, 8), [value; 3]);
    }
    let (stored, _) = photos.open(None, false).unwrap();
    assert_eq!(stored.dim(), [3, 8, 8], "no larger than they are");
    let of = |split| -> Vec<_> {
        let all = (0..stored.len(split)).map(|i| bytes(&stored, split, i));
        all.map(|(pixels, label)| (pixels[0], label)).collect::<BTreeSet<_>>().into_iter().collect()
    };
    assert_eq!(of(Split::Train), [(10, 0), (11, 0), (20, 1)]);
    assert_eq!((of(Split::Validation), of(Split::Test)), (vec![(30, 1)], vec![(40, 0)]));

    photos.add("val/c/1.png", (8, 8), [0; 3]);
    photos.refused(&["val/c", "without training pictures", "remove the folder"]);
    fs::remove_dir_all(photos.dir().join("val/c")).unwrap();
    photos.add("valid/a/1.png", (8, 8), [0; 3]);
    photos.refused(&["both val and valid", "keep one"]);
    // With other folders beside it, `train` is a class.
    fs::remove_dir_all(photos.dir().join("valid")).unwrap();
    photos.add("bus/1.png", (8, 8), [0; 3]);
    assert_eq!(photos.open(Some(8), false).unwrap().0.class_names(), ["bus", "test", "train", "val"]);
}

#[test]
fn broken_pictures_are_named_and_left_out_or_refused() {
    let photos = coloured();
    photos.write("Rot/03.png", b"no picture");
    photos.write("blau/x.jpg", &[]);
    for _ in 0..2 {
        let (stored, _) = photos.open(Some(8), false).unwrap();
        assert_eq!(lens(&stored).iter().sum::<usize>(), 32);
        let note = &stored.notes()[0];
        for part in ["2 of 34 pictures", "Rot/03.png", "blau/x.jpg", "data verify", "--strict"] {
            assert!(note.contains(part), "{note}");
        }
        // Kept or not, they are refused if they are to be.
        assert_refused(photos.open(Some(8), true), &["Rot/03.png", "is no picture", "--strict"]);
    }
    fs::remove_dir_all(photos.cache()).unwrap();
    assert_refused(photos.open(Some(8), true), &["Rot/03.png", "is no picture", "--strict"]);
    let folder::Report { problems, counts } = folder::verify(&photos.dir(), &mut |_| {}).unwrap();
    assert_eq!(problems.iter().filter(|e| matches!(e, Error::Data { .. })).count(), 2);
    assert_eq!(counts, [("Rot".into(), 11), ("blau".into(), 10), ("grün".into(), 11)]);

    photos.write("leer/1.jpg", b"nothing");
    photos.refused(&["no picture of the class `leer`", "leer/1.jpg: is no picture", "remove the folder"]);
}

#[test]
fn folders_that_do_not_serve_are_one_line() {
    let photos = coloured();
    assert_refused(photos.open(Some(7), false), &["image size", "7x7", "give 8 to 4096"]);
    fs::create_dir(photos.dir().join("empty")).unwrap();
    photos.refused(&["empty", "has no JPEG, PNG, WebP or BMP pictures", "remove the folder"]);
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(photos.dir().join("blau"), photos.dir().join("blau/again")).unwrap();
        photos.refused(&["blau", "cannot be read", "loop", "remove it"]);
    }
    let loose = Photos::new();
    loose.add("1.png", (8, 8), [0; 3]);
    assert_eq!(Format::of(&loose.dir()).unwrap(), Format::Pictures);
    loose.refused(&["no folders of classes", "put the pictures of each class into a folder"]);
    assert_refused(Format::of(&loose.dir().join("1.png")), &["1.png", "is not a folder"]);
    assert_refused(Format::of(&loose.dir().join("2")), &["there is no such folder", "gemmnet data fetch"]);
    fs::create_dir(loose.root.path().join("bare")).unwrap();
    assert_refused(
        Format::of(&loose.root.path().join("bare")),
        &["no data that is known", "x_train.npy", "for each class"],
    );
    // The cache cannot be made where a file is.
    fs::write(loose.root.path().join("cache"), "").unwrap();
    loose.add("a/1.png", (8, 8), [0; 3]);
    loose.add("a/2.png", (8, 8), [0; 3]);
    loose.refused(&["cannot write", "1 MB", "GEMMNET_DATA_DIR"]);
}

#[test]
fn grey_pictures_have_three_channels_in_a_folder() {
    let photos = Photos::new();
    fs::create_dir_all(photos.dir().join("a")).unwrap();
    for i in 0..3 {
        GrayImage::from_pixel(70, 90, Luma([77])).save(photos.dir().join(format!("a/{i}.jpg"))).unwrap();
    }
    let (stored, _) = photos.open(None, false).unwrap();
    assert_eq!(stored.dim(), [3, 64, 64], "large ones are made 64x64");
    assert_eq!(bytes(&stored, Split::Train, 0).0, [77; 3 * 64 * 64]);
    // What `predict` sees is what training saw.
    let seen = decode::read_picture(&photos.dir().join("a/0.jpg"), stored.dim()).unwrap();
    assert_eq!(seen, bytes(&stored, Split::Train, 0).0);
}

/// Records as CIFAR-100's: pixels count up from the fine label.
fn cifar100_records(n: usize, first: usize) -> Vec<u8> {
    let record = |i: usize| {
        let fine = ((first + i) % 100) as u8;
        [fine / 5, fine].into_iter().chain((0..3072).map(move |p: usize| (p + fine as usize) as u8))
    };
    (0..n).flat_map(record).collect()
}

#[test]
fn cifar100_is_read_to_its_specification() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join(cifar100::FOLDER);
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join(cifar100::TRAIN), cifar100_records(150, 0)).unwrap();
    fs::write(dir.join(cifar100::TEST), cifar100_records(30, 7)).unwrap();
    for dir in [root.path(), &dir] {
        assert_eq!(Format::of(dir).unwrap(), Format::Cifar100);
        let stored = cifar100::open(dir).unwrap();
        assert_eq!((stored.dim(), lens(&stored)), ([3, 32, 32], [147, 3, 30]));
        assert_eq!((stored.class_names().len(), &*stored.class_names()[99]), (100, "99"));
        for (split, index, label) in
            [(Split::Train, 0, 0), (Split::Train, 146, 46), (Split::Validation, 2, 49), (Split::Test, 29, 36)]
        {
            let (pixels, got) = bytes(&stored, split, index);
            assert_eq!(got, label, "{split:?} {index}: the fine label");
            assert!(pixels.iter().enumerate().all(|(p, &pixel)| pixel == (p + label) as u8));
        }
    }
    let names: String = (0..100).map(|i| format!("class{i}\n")).collect();
    fs::write(dir.join(cifar100::NAMES), names + "\n").unwrap();
    assert_eq!(cifar100::open(&dir).unwrap().class_names()[99], "class99");
    fs::write(dir.join(cifar100::NAMES), "apple\npear\n").unwrap();
    assert_refused(cifar100::open(&dir), &["fine_label_names.txt", "names 2 classes", "100", "remove the file"]);
    fs::remove_file(dir.join(cifar100::NAMES)).unwrap();

    let train = cifar100_records(10, 0);
    let refused = |bytes: &[u8], parts: &[&str]| {
        fs::write(dir.join(cifar100::TRAIN), bytes).unwrap();
        assert_refused(cifar100::open(&dir), parts);
    };
    refused(&train[..3 * cifar100::RECORD + 9], &["train.bin", "3 records", "9 bytes over", "truncated", "unpack"]);
    refused(&[], &["train.bin", "empty", "unpack"]);
    for (at, label) in [(0, 20), (1, 100)] {
        let mut bad = train.clone();
        bad[4 * cifar100::RECORD + at] = label;
        refused(&bad, &["record 4 has the labels", &label.to_string(), "0 to 19", "0 to 99"]);
    }
    fs::write(dir.join(cifar100::TRAIN), &train).unwrap();
    fs::remove_file(dir.join(cifar100::TEST)).unwrap();
    assert_refused(cifar100::open(&dir), &["cannot read", "test.bin", "cifar-100-binary.tar.gz"]);
}

/// An IDX file of bytes with these sizes.
fn idx_file(sizes: &[u32], values: impl Iterator<Item = u8>) -> Vec<u8> {
    let mut file = vec![0, 0, 8, sizes.len() as u8];
    sizes.iter().for_each(|size| file.extend(size.to_be_bytes()));
    file.extend(values);
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gz = GzEncoder::new(Vec::new(), Compression::fast());
    gz.write_all(bytes).unwrap();
    gz.finish().unwrap()
}

/// `n` images 5x7 whose pixels all are their index, and labels in turn from 0 to 3.
fn idx_pair(n: u32) -> [Vec<u8>; 2] {
    let images = (0..n).flat_map(|i| std::iter::repeat_n(i as u8, 35));
    [idx_file(&[n, 5, 7], images), idx_file(&[n], (0..n).map(|i| (i % 4) as u8))]
}

#[test]
fn idx_files_are_read_to_their_specification() {
    let [train, test] = [idx_pair(40), idx_pair(8)];
    for (folder, gz, prefix, tests) in [
        ("", false, "", "t10k"),
        ("raw", true, "", "t10k"),
        ("MNIST/raw", true, "emnist-letters-", "test"),
        ("", false, "", "none"),
    ] {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join(folder);
        fs::create_dir_all(&dir).unwrap();
        for (part, [images, labels]) in [("train", &train), (tests, &test)] {
            let joint = if gz { "-" } else { "." };
            let names = [format!("images{joint}idx3"), format!("labels{joint}idx1")];
            for (name, bytes) in names.iter().zip([images, labels]) {
                let name = format!("{prefix}{part}-{name}-ubyte{}", if gz { ".gz" } else { "" });
                fs::write(dir.join(name), if gz { gzip(bytes) } else { bytes.clone() }).unwrap();
            }
        }
        assert_eq!(Format::of(root.path()).unwrap(), Format::Idx);
        let stored = idx::open(root.path()).unwrap();
        assert_eq!((stored.dim(), stored.class_names()), ([1, 5, 7], &["0", "1", "2", "3"].map(String::from)[..]));
        // A tenth of each class of 10 for validation, and where there are no tests, another one for them.
        assert_eq!(lens(&stored), if tests == "none" { [32, 4, 4] } else { [36, 4, 8] });
        let mut seen = Vec::new();
        for split in [Split::Train, Split::Validation].into_iter().chain((tests == "none").then_some(Split::Test)) {
            for index in 0..stored.len(split) {
                let (pixels, label) = bytes(&stored, split, index);
                assert!(pixels.len() == 35 && pixels.iter().all(|pixel| *pixel == pixels[0]));
                assert_eq!(usize::from(pixels[0]) % 4, label);
                seen.push(pixels[0]);
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..40).collect::<Vec<u8>>());
        fs::write(dir.join("class_names.txt"), "spring\nsummer\nautumn\nwinter\n").unwrap();
        assert_eq!(idx::open(root.path()).unwrap().class_names()[3], "winter");
    }
}

#[test]
fn idx_files_that_do_not_serve_are_one_line() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path();
    let [images, labels] = idx_pair(12);
    let refused = |name: &str, bytes: &[u8], parts: &[&str]| {
        fs::write(dir.join("train-images-idx3-ubyte"), &images).unwrap();
        fs::write(dir.join("train-labels-idx1-ubyte"), &labels).unwrap();
        idx::open(dir).unwrap();
        if name.ends_with(".gz") {
            fs::remove_file(dir.join(name.strip_suffix(".gz").unwrap())).unwrap();
        }
        fs::write(dir.join(name), bytes).unwrap();
        assert_refused(idx::open(dir), parts);
        fs::remove_file(dir.join(name)).unwrap();
    };
    let name = "train-images-idx3-ubyte";
    refused(name, &images[..400], &[name, "has 400 bytes, its header says 436", "truncated", "restore"]);
    refused(name, &images[..9], &[name, "9 bytes, too few for a header"]);
    refused(name, &[&images[..], &[1, 2]].concat(), &[name, "more bytes than the 436"]);
    refused(name, &labels, &[name, "0x00000801, not 0x00000803", "3 axes"]);
    refused(name, &idx_file(&[u32::MAX; 3], [].into_iter()), &[name]);
    refused(name, &idx_file(&[0, 5, 7], [].into_iter()), &[name, "0 images of 7x5"]);
    refused(name, &idx_file(&[12, 0, 7], [].into_iter()), &[name, "12 images of 7x0"]);
    refused(name, &idx_pair(11)[0], &["train-labels", "12 labels for 11 images"]);
    let gz = format!("{name}.gz");
    let packed = gzip(&images);
    refused(&gz, &packed[..packed.len() / 2], &[&gz, "gzip", "restore"]);
    refused(&gz, &images, &[&gz, "gzip"]);
    // Claims of much are not believed.
    refused(&gz, &gzip(&idx_file(&[u32::MAX, 60_000, 60_000], 0..9)), &[&gz, "truncated"]);
    refused(&gz, &gzip(&[&images[..], &[0; 9]].concat()), &[&gz, "more bytes"]);
    let other = "fashion-train-images-idx3-ubyte";
    refused(other, &images, &["two data sets", other, "folder of their own"]);

    fs::write(dir.join(name), &images).unwrap();
    fs::remove_file(dir.join("train-labels-idx1-ubyte")).unwrap();
    assert_refused(idx::open(dir), &[name, "no labels", "train-labels-idx1-ubyte"]);
    fs::write(dir.join("train-labels-idx1-ubyte"), &labels).unwrap();
    fs::write(dir.join("t10k-images-idx3-ubyte"), idx_file(&[2, 7, 5], (0..70).map(|_| 0))).unwrap();
    assert_refused(idx::open(dir), &["t10k-images", "no labels", "t10k-labels"]);
    fs::write(dir.join("t10k-labels-idx1-ubyte"), idx_file(&[2], 0..2)).unwrap();
    assert_refused(idx::open(dir), &["test images of 5x7", "7x5"]);
    fs::write(dir.join("t10k-images-idx3-ubyte"), idx_file(&[2, 5, 7], (0..70).map(|_| 0))).unwrap();
    idx::open(dir).unwrap();
    fs::write(dir.join("class_names.txt"), "one\ntwo").unwrap();
    assert_refused(idx::open(dir), &["class_names.txt", "names 2 classes, the labels need 4"]);
}

/// A `.npy` file of an array.
fn npy<T: WritableElement, D: Dimension>(array: &Array<T, D>) -> Vec<u8> {
    let mut bytes = Vec::new();
    array.write_npy(&mut bytes).unwrap();
    bytes
}

/// Images 2x3x4 whose pixels are all their index, as floats or bytes; and labels in turn 0 and 1.
fn npy_images<T: WritableElement + Clone>(n: usize, value: impl Fn(usize) -> T) -> Vec<u8> {
    npy(&Array4::from_shape_fn((n, 2, 3, 4), |(i, ..)| value(i)))
}

fn npy_labels(n: usize) -> Vec<u8> {
    npy(&Array1::from_iter((0..n).map(|i| (i % 2) as i64)))
}

fn npz(path: &Path, method: CompressionMethod, members: &[(&str, &[u8])]) {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        zip.start_file(format!("{name}.npy"), SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    fs::write(path, zip.finish().unwrap().into_inner()).unwrap();
}

#[test]
fn arrays_are_read_from_npy_and_npz() {
    let members: [(&str, Vec<u8>); 6] = [
        ("x_train", npy_images(9, |i| i as u8)),
        ("y_train", npy_labels(9)),
        ("x_val", npy_images(3, |i| 100 + i as u8)),
        ("y_val", npy(&Array::from_shape_vec((3, 1), vec![0_u8, 1, 0]).unwrap())),
        ("x_test", npy_images(2, |i| 200 + i as u8)),
        ("y_test", npy(&Array1::from(vec![1_i32, 0]))),
    ];
    let borrowed: Vec<_> = members.iter().map(|(name, bytes)| (*name, &bytes[..])).collect();
    for way in ["npy", "stored", "deflated"] {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path();
        match way {
            "npy" => {
                members.iter().for_each(|(name, bytes)| fs::write(dir.join(format!("{name}.npy")), bytes).unwrap())
            }
            "stored" => npz(&dir.join("all.npz"), CompressionMethod::Stored, &borrowed),
            _ => npz(&dir.join("all.npz"), CompressionMethod::Deflated, &borrowed),
        }
        assert_eq!(Format::of(dir).unwrap(), Format::Arrays);
        let stored = arrays::open(dir).unwrap();
        assert_eq!((stored.dim(), lens(&stored), stored.class_names().len()), ([2, 3, 4], [9, 3, 2], 2), "{way}");
        let all = |split| (0..stored.len(split)).map(|i| bytes(&stored, split, i)).collect::<BTreeSet<_>>();
        assert_eq!(all(Split::Train), (0..9).map(|i| (vec![i; 24], usize::from(i % 2))).collect());
        assert_eq!(
            all(Split::Validation),
            [0, 1, 0].into_iter().zip(100..).map(|(label, i)| (vec![i; 24], label)).collect()
        );
        assert_eq!(all(Split::Test), [(vec![200; 24], 1), (vec![201; 24], 0)].into_iter().collect());
        assert!(stored.notes().is_empty());
    }
    // Floats; grey images without an axis for it; splits that are not there.
    let root = tempfile::tempdir().unwrap();
    let dir = root.path();
    let grey = Array::from_shape_fn((20, 6, 5), |(i, ..)| i as f32 / 2.0);
    fs::write(dir.join("x_train.npy"), npy(&grey)).unwrap();
    fs::write(dir.join("y_train.npy"), npy_labels(20)).unwrap();
    let stored = arrays::open(dir).unwrap();
    assert_eq!((stored.dim(), lens(&stored)), ([1, 6, 5], [16, 2, 2]));
    let (Image::Floats(pixels), label) = stored.image(Split::Train, 0) else { panic!("floats") };
    assert_eq!((pixels.len(), (2.0 * pixels[29]) as usize % 2), (30, label));
    assert!(stored.notes()[0].contains("floats") && stored.notes()[0].contains("0 to 255"));
}

#[test]
fn arrays_that_do_not_serve_are_one_line() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path();
    let refused = |name: &str, bytes: &[u8], parts: &[&str]| {
        fs::write(dir.join("x_train.npy"), npy_images(4, |i| i as u8)).unwrap();
        fs::write(dir.join("y_train.npy"), npy_labels(4)).unwrap();
        arrays::open(dir).unwrap();
        fs::write(dir.join(name), bytes).unwrap();
        assert_refused(arrays::open(dir), parts);
        fs::remove_file(dir.join(name)).unwrap();
    };
    let images = npy_images(4, |i| i as u8);
    let header =
        |text: &str| [b"\x93NUMPY\x01\0".as_slice(), &(text.len() as u16).to_le_bytes(), text.as_bytes()].concat();
    let x = "x_train.npy";
    refused(x, &images[..150], &[x, "lacks", "truncated", "np.save"]);
    refused(x, &[&images[..], &[0]].concat(), &[x, "np.save"]);
    refused(x, b"\x93NUMPY", &[x, "no .npy file"]);
    refused(x, b"PK\x03\x04 something", &[x, "no .npy file"]);
    refused(x, &npy_images(4, |i| i as f64), &[x, "neither uint8 nor float32", "np.save"]);
    refused(x, &npy(&Array::<u8, _>::zeros((4, 5))), &[x, "2 axes [4, 5]", "(N, C, H, W)"]);
    refused(x, &npy(&Array::<u8, _>::zeros((4, 32, 32, 3))), &[x, "(N, H, W, C)", "transpose(0, 3, 1, 2)"]);
    refused(x, &npy(&Array::<u8, _>::zeros((4, 2, 0, 3))), &[x, "no pixels", "[4, 2, 0, 3]"]);
    refused(x, &npy(&Array::<u8, _>::zeros((4, 2, 3, 3).f())), &[x, "Fortran", "ascontiguousarray"]);
    refused(x, &header("{'descr': '>f4', 'fortran_order': False, 'shape': (1, 1, 1, 1), }\n    "), &[x]);
    // Shapes and headers that no memory holds, and such as would go deep.
    for shape in
        ["(4, 99999999, 99999999, 99999999)", "(0, 18446744073709551615, 2, 9)", "(4, 18446744073709551616, 1, 1)"]
    {
        refused(x, &header(&format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n")), &[x]);
    }
    refused(x, &header(&"(".repeat(900)), &[x]);
    refused(x, &header(&"(".repeat(60_000)), &[x, "no .npy file of a plain array"]);
    refused(x, &[b"\x93NUMPY\x02\0\xff\xff\xff\xff".as_slice(), &[0; 90]].concat(), &[x, "no .npy file"]);
    let y = "y_train.npy";
    refused(y, &npy_labels(3), &[y, "3 labels for 4 images"]);
    refused(y, &npy(&Array1::from(vec![0_i64, 1, -1, 0])), &[y, "label 2 is -1", "from 0"]);
    refused(y, &npy(&Array1::from(vec![0_u32, 1, 70_000, 0])), &[y, "label 2 is 70000", "65535"]);
    refused(y, &npy(&Array1::from(vec![0_f32, 1.0, 0.0, 0.0])), &[y, "no whole numbers"]);
    refused(y, &npy(&Array::<i64, _>::zeros((4, 10))), &[y, "[4, 10]", "(N)"]);
    refused("x_val.npy", &npy_images(2, |i| i as u8), &["x_val.npy", "no labels", "y_val"]);
    refused("x_test.npy", &npy_images(2, |i| i as f32), &["x_test.npy", "one size and type"]);
    let grey = Array::<u8, _>::zeros((2, 4, 4));
    refused("x_test.npy", &npy(&grey), &["x_test.npy", "[1, 4, 4]", "[2, 3, 4]"]);

    for name in ["x_train.npy", "y_train.npy"] {
        let _ = fs::remove_file(dir.join(name));
    }
    let archive = dir.join("a.npz");
    fs::write(&archive, b"no archive").unwrap();
    assert_refused(arrays::open(dir), &["a.npz", "no whole .npz file", "np.savez"]);
    npz(&archive, CompressionMethod::Deflated, &[("images", &images)]);
    assert_refused(arrays::open(dir), &["a.npz", "no array x_train"]);
    npz(&archive, CompressionMethod::Deflated, &[("x_train", &images)]);
    assert_refused(arrays::open(dir), &["a.npz", "there is no y_train"]);
    let whole = fs::read(&archive).unwrap();
    let mut damaged = whole.clone();
    damaged[60..90].fill(0xaa);
    fs::write(&archive, damaged).unwrap();
    assert_refused(arrays::open(dir), &["a.npz", "no whole .npz file"]);
    fs::write(dir.join("b.npz"), whole).unwrap();
    assert_refused(arrays::open(dir), &["a.npz and b.npz", "one .npz file"]);
}
