//! Level 7. `gemmnet eval`: how good a saved network is.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;

use super::data::{Folder, check_fits, small_test};
use super::output::{Align, Output, Table, thousands};
use super::{Global, Stop, runs};
use crate::data::{Dataset, Normalization, Split, Views};
use crate::element::Element;
use crate::error::Error;
use crate::train::{Model, predict};

/// Measure a saved network: accuracy and confusion matrix
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  gemmnet eval\n  gemmnet eval --checkpoint deep.safetensors --split validation\n  gemmnet eval --views 6"
)]
pub(super) struct EvalArgs {
    /// File of a saved network, or folder of a run [default: the last run in runs]
    #[arg(long, value_name = "PATH")]
    checkpoint: Option<PathBuf>,
    /// Images to measure on [default: test-full; validation where the data has no images for tests]
    #[arg(long, value_name = "NAME")]
    split: Option<SplitName>,
    /// Images that go through the network at once; takes memory, changes no result
    #[arg(long, value_name = "IMAGES", default_value_t = 500)]
    batch_size: usize,
    /// Ways to show each image, over which its scores are averaged
    #[arg(long, value_name = "N", default_value = "1")]
    views: ViewsName,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SplitName {
    /// What is held out of the training images: 1,000 images of CIFAR-10
    Validation,
    /// The first 1,000 images for tests, as in CS231n
    Test,
    /// All images for tests: what published accuracies refer to
    TestFull,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ViewsName {
    /// As it is
    #[value(name = "1")]
    One,
    /// Plain and mirrored
    #[value(name = "2")]
    Two,
    /// These two, and both moved by a pixel to either side with half of the weight
    #[value(name = "6")]
    Six,
}

impl From<ViewsName> for Views {
    fn from(name: ViewsName) -> Self {
        match name {
            ViewsName::One => Views::One,
            ViewsName::Two => Views::Two,
            ViewsName::Six => Views::Six,
        }
    }
}

pub(super) fn run(args: &EvalArgs, global: &Global, out: &Output) -> Result<(), Stop> {
    let path = runs::saved_network(args.checkpoint.as_deref())?;
    match load_any(&path)? {
        Any::F32(model) => eval(model, &path, args, global, out),
        Any::F64(model) => eval(model, &path, args, global, out),
    }
}

/// A model of either type.
pub(super) enum Any {
    F32(Model<f32>),
    F64(Model<f64>),
}

/// Loads a model of whichever type the file holds.
pub(super) fn load_any(path: &Path) -> Result<Any, Error> {
    // Mostly f32. If it is neither, the first error says why it is not what it most probably is.
    Model::load(path).map(Any::F32).or_else(|error| Model::load(path).map(Any::F64).map_err(|_| error))
}

/// What images are taken for.
pub(super) struct Confusion {
    /// Rows: what the images show; columns: what the network sees.
    pub(super) counts: Vec<Vec<usize>>,
    /// Of what each class shows, images that the network gives no class of the data.
    pub(super) unclassified: Vec<usize>,
}

impl Confusion {
    pub(super) fn new(classes: usize) -> Self {
        Confusion { counts: vec![vec![0; classes]; classes], unclassified: vec![0; classes] }
    }

    /// Counts an image. A network may have more classes than the data.
    pub(super) fn add(&mut self, shown: usize, seen: Option<usize>) {
        match seen.filter(|&class| class < self.counts.len()) {
            Some(class) => self.counts[shown][class] += 1,
            None => self.unclassified[shown] += 1,
        }
    }
}

fn eval<T: Element>(
    mut model: Model<T>,
    path: &Path,
    args: &EvalArgs,
    global: &Global,
    out: &Output,
) -> Result<(), Stop> {
    let normalizer = model.normalizer(path)?.clone();
    let data_dir = global.data_dir.clone().map_or_else(|| runs::data_dir(path), |dir| Ok(Some(dir)))?;
    let folder = Folder::of_classes(&model.class_names, data_dir.as_deref())?;
    let opened = folder.open(folder.like(&model.network, false), out)?;
    let data = Dataset::new(opened.source.clone(), Normalization::MeanImage)?;
    check_fits(&data, &folder, &model.network, &model.class_names, path)?;
    let mut data = data.with_normalizer(normalizer)?;
    data.notes().iter().for_each(|note| out.note(format_args!("note: {note}")));
    let whole = if data.len(Split::Test) > 0 { SplitName::TestFull } else { SplitName::Validation };
    let asked = args.split.unwrap_or(whole);
    let (split, split_name) = match asked {
        SplitName::Validation => (Split::Validation, "validation"),
        SplitName::Test => (Split::Test, "test"),
        SplitName::TestFull => (Split::Test, "test-full"),
    };
    if let SplitName::Test = asked {
        data = small_test(&data)?.unwrap_or(data);
    }

    let classes = data.classes();
    let views = Views::from(args.views);
    let predicted = predict(&mut model.network, &data, split, args.batch_size, views)?;
    let mut confusion = Confusion::new(classes);
    predicted.iter().enumerate().for_each(|(index, &class)| confusion.add(data.image(split, index).1, class));
    let Confusion { counts: confusion, unclassified: without } = confusion;
    let correct: usize = (0..classes).map(|class| confusion[class][class]).sum();
    let unclassified: usize = without.iter().sum();
    let accuracy = correct as f64 / predicted.len() as f64;

    let names = data.class_names();
    let head = names.iter().map(|name| (name.as_str(), Align::Right));
    let mut table = Table::new([("", Align::Left)].into_iter().chain(head).chain([("correct", Align::Right)]));
    for (class, (name, row)) in names.iter().zip(&confusion).enumerate() {
        let images = row.iter().sum::<usize>() + without[class];
        let correct =
            if images == 0 { String::new() } else { format!("{:.1} %", 100.0 * row[class] as f64 / images as f64) };
        table.row([name.clone()].into_iter().chain(row.iter().map(usize::to_string)).chain([correct]));
    }
    out.line(format_args!("Rows: what the images show; columns: what the network takes them for.\n{table}"))?;
    if unclassified > 0 {
        out.note(format_args!("note: for {unclassified} images the network gave no class of the data"));
    }
    let views = views.weighted().len();
    let each = if views == 1 { String::new() } else { format!(", {views} views of each") };
    out.line(format_args!("accuracy: {accuracy:.4} of {} images ({split_name}{each})", thousands(predicted.len())))?;
    out.json(&json!({
        "accuracy": accuracy,
        "split": split_name,
        "views": views,
        "images": predicted.len(),
        "unclassified": unclassified,
        "class_names": names,
        "confusion": confusion,
        "data": opened.kind,
        "data_dir": folder.dir.display().to_string(),
        "checkpoint": path.display().to_string(),
    }))
}
