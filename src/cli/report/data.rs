//! Level 7. What a report is made of: a run's configuration, its history, and what its network makes of images.

use serde::{Deserialize, Serialize};

pub(in crate::cli) use crate::cli::runs::events::{End, Entry, Epoch, Operation, Start, Step};

/// What the kept network makes of the validation images: `evaluation.json`.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(in crate::cli) struct Evaluation {
    pub(in crate::cli) images: usize,
    /// `(classes, classes)`: how many images of a class, the row, are taken for which, the column.
    pub(in crate::cli) confusion: Vec<Vec<usize>>,
    /// `(classes)`: how many images of a class have scores that are no numbers.
    pub(in crate::cli) unclassified: Vec<usize>,
    /// What it is most wrong about, the worst first.
    pub(in crate::cli) worst: Vec<Picture>,
}

/// An image that the network takes for something else.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(in crate::cli) struct Picture {
    /// Its place among the images for validation.
    pub(in crate::cli) index: usize,
    pub(in crate::cli) label: usize,
    /// None if the scores are no numbers.
    pub(in crate::cli) predicted: Option<usize>,
    pub(in crate::cli) label_probability: Option<f64>,
    pub(in crate::cli) predicted_probability: Option<f64>,
    /// The image itself, as [`super::pictures::picture`] makes it.
    pub(in crate::cli) png: String,
}

/// Weights of the first layer.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Filters {
    /// `[F, C, KH, KW]`.
    pub(in crate::cli) shape: [usize; 4],
    /// `(F, C, KH, KW)`.
    pub(in crate::cli) values: Vec<f32>,
}

/// A run, as its folder tells of it.
#[derive(Clone, Debug)]
pub(in crate::cli) struct Run {
    pub(in crate::cli) name: String,
    /// The text of `config.toml`.
    pub(in crate::cli) config: String,
    /// The beginning, and every time it went on.
    pub(in crate::cli) starts: Vec<Start>,
    pub(in crate::cli) steps: Vec<Step>,
    pub(in crate::cli) epochs: Vec<Epoch>,
    /// None while it is not over.
    pub(in crate::cli) end: Option<Box<End>>,
    /// Lines of the history that cannot be read, except the last one if it is cut off.
    pub(in crate::cli) unread: usize,
}

impl Run {
    /// The run called `name` of which `history` has a line for each event.
    pub(in crate::cli) fn new(name: &str, config: &str, history: &str) -> Self {
        let (name, config) = (name.to_owned(), config.to_owned());
        let (starts, steps, epochs) = (Vec::new(), Vec::new(), Vec::new());
        let mut run = Run { name, config, starts, steps, epochs, end: None, unread: 0 };
        for line in history.split_inclusive('\n').filter(|line| !line.trim().is_empty()) {
            match read(line) {
                Some(entry) => run.add(entry),
                // It is being written, or was when the process ended.
                None if !line.ends_with('\n') => {}
                None => run.unread += 1,
            }
        }
        run
    }

    fn add(&mut self, entry: Entry) {
        match entry {
            // What came after the saved state that it goes on from will come again.
            Entry::Start(start) => {
                self.steps.retain(|step| step.step <= start.step);
                self.epochs.retain(|epoch| epoch.step <= start.step);
                self.end = None;
                self.starts.push(*start);
            }
            Entry::Step(step) => self.steps.push(step),
            Entry::Epoch(epoch) => self.epochs.push(epoch),
            Entry::End(end) => self.end = Some(end),
        }
    }

    /// How it went on last.
    pub(super) fn start(&self) -> Option<&Start> {
        self.starts.last()
    }

    /// The epoch after which the network is kept, and its accuracy on the validation images; the best so far if it is not over.
    pub(super) fn kept(&self) -> Option<(f64, f64)> {
        let so_far = || self.epochs.iter().rfind(|epoch| epoch.kept).map(|epoch| (epoch.epoch, epoch.val_accuracy));
        self.end.as_ref().map(|end| (end.kept_epoch, end.kept_val_accuracy)).or_else(so_far)
    }

    pub(super) fn test_accuracy(&self) -> Option<f64> {
        self.end.as_ref().and_then(|end| end.test_accuracy)
    }

    /// Iterations so far.
    pub(super) fn done(&self) -> usize {
        let end = self.end.as_ref().map(|end| end.step);
        let last = self.steps.last().map(|step| step.step).max(self.start().map(|start| start.step));
        end.or(last).unwrap_or(0)
    }

    /// Seconds of training so far.
    pub(super) fn seconds(&self) -> Option<f64> {
        self.end.as_ref().map(|end| end.seconds).or_else(|| self.steps.last().map(|step| step.seconds))
    }

    /// What a class is called.
    pub(super) fn class(&self, class: usize) -> String {
        let name = self.start().and_then(|start| start.classes.get(class));
        name.cloned().unwrap_or_else(|| format!("class {class}"))
    }
}

/// An entry. A line that was cut off may have the next one behind it, where a training was resumed.
fn read(line: &str) -> Option<Entry> {
    let last = line.rfind(r#"{"event":"#).unwrap_or(0);
    serde_json::from_str(line).or_else(|_| serde_json::from_str(&line[last..])).ok()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) const START: &str = r#"{"event":"start","step":0,"version":"0.1.0","threads":2,"processor":"Some CPU","vectors":"avx512","blas":"OpenBLAS","dtype":"f32","network":"affine2","parameters":20,"preset":null,"seed":0,"data":"cifar10","data_dir":"data","image":[3,2,2],"images":{"train":40,"validation":10,"test":10},"classes":["cat","<script>alert(1)</script>"],"steps":4,"steps_per_epoch":2}"#;

    pub(in super::super) fn step(step: usize, loss: &str) -> String {
        format!(r#"{{"event":"step","step":{step},"loss":{loss},"learning_rate":0.1,"seconds":{step}}}"#)
    }

    pub(in super::super) fn epoch(step: usize, val: f64, kept: bool) -> String {
        let epoch = step as f64 / 2.0;
        format!(
            r#"{{"event":"epoch","step":{step},"epoch":{epoch},"train_accuracy":0.5,"val_accuracy":{val},"kept":{kept},"seconds":{step}}}"#
        )
    }

    pub(in super::super) fn end(val: f64, test: &str, seconds: f64) -> String {
        format!(
            r#"{{"event":"end","step":4,"kept_epoch":1,"kept_val_accuracy":{val},"test_accuracy":{test},"seconds":{seconds},"images_per_second":10.0,"profile":[{{"operation":"affine2","phase":"forward","seconds":0.0,"calls":0,"flops":0,"bytes":0}}]}}"#
        )
    }

    #[test]
    fn what_comes_again_after_a_resume_is_there_once() {
        let again = START.replace(r#""step":0"#, r#""step":2"#);
        let first = [START, &step(1, "2.0"), &step(2, "1.0"), &epoch(2, 0.5, true), &step(3, "9.0")].join("\n");
        let second = [&again, &step(3, "0.5"), &step(4, "0.4"), &epoch(4, 0.4, false)].map(|line| &**line).join("\n");
        // Writing was cut off, and went on in the same line.
        let run = Run::new("a", "", &format!("{first}\n{{\"event\":\"st{second}\n"));
        assert_eq!(run.steps.iter().map(|step| step.loss).collect::<Vec<_>>(), [2.0, 1.0, 0.5, 0.4]);
        assert_eq!((run.unread, run.done(), run.kept()), (0, 4, Some((1.0, 0.5))));
    }

    #[test]
    fn a_torn_line_is_no_problem() {
        let whole = format!("{START}\n{}\n", step(1, "2.5"));
        let run = Run::new("a", "", &format!("{whole}{}", &step(2, "1.0")[..20]));
        assert_eq!((run.steps.len(), run.unread), (1, 0));
        assert_eq!(Run::new("a", "", &format!("{whole}?\n{}", step(2, "1.0"))).unread, 1);
    }

    #[test]
    fn events_are_written_as_they_are_read() {
        let lines = [START.to_owned(), step(1, "2.5"), epoch(2, 0.5, true), end(0.5, "null", 2.0)];
        for line in lines {
            let event: Entry = serde_json::from_str(&line).expect("a line of the history");
            let again: serde_json::Value = serde_json::to_value(&event).expect("plain data");
            let event: Entry = serde_json::from_value(again.clone()).expect("what was written");
            assert_eq!(serde_json::to_value(&event).expect("plain data"), again);
        }
    }
}
