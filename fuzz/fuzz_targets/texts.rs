//! Texts of options: schedules, update rules with their numbers, selections of parameters, initial weights, activations: no
//! panic; what is read is printed and read again as the same, alone and as JSON; rates are numbers from 0 up.
#![no_main]

use std::fmt::{Debug, Display};
use std::str::FromStr;

use gemmnet::Error;
use gemmnet::nn::init::Init;
use gemmnet::ops::activation::Activation;
use gemmnet::optim::{LearningRate, Progress, Schedule, Select, UpdateRule};
use gemmnet::params::{Layout, ParamKind, Params};
use gemmnet_fuzz::{check_error, taken};
use libfuzzer_sys::fuzz_target;

/// What a text is read as, if it is one.
fn read<V: FromStr<Err = Error> + Display + PartialEq + Debug>(text: &str) -> Option<V> {
    match text.parse::<V>() {
        Ok(value) => {
            assert_eq!(value.to_string().parse::<V>().expect("what was printed is read"), value);
            taken(&value);
            Some(value)
        }
        Err(error) => {
            check_error(&error);
            None
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    if let Some(schedule) = read::<Schedule>(&text) {
        check_schedule(schedule);
    }
    if let Some(select) = read::<Select>(&text) {
        let mut layout = Layout::default();
        for name in ["conv1.weight", "conv1.bias", "bn12.weight", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab"] {
            layout.push(name.into(), &[1], ParamKind::Bias);
        }
        let chosen = Params::<f32>::zeros(layout).iter().filter(|param| select.matches(param)).count();
        assert!(chosen <= 4);
    }
    read::<Init>(&text);
    read::<Activation>(&text);
    // `rule,name=value,name=value`
    let mut parts = text.split(',');
    let mut rule = match parts.next().unwrap_or_default().parse::<UpdateRule>() {
        Ok(rule) => rule,
        Err(error) => return check_error(&error),
    };
    for part in parts {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        match rule.with(name, value) {
            Ok(changed) => rule = changed,
            Err(error) => check_error(&error),
        }
    }
    assert_eq!(UpdateRule::ALL.iter().filter(|known| known.name() == rule.name()).count(), 1);
    let json = serde_json::to_string(&rule).expect("a rule has a JSON form");
    assert_eq!(serde_json::from_str::<UpdateRule>(&json).expect("what was written is read"), rule);
});

/// Rates over a training.
fn check_schedule(schedule: Schedule) {
    for warmup in [0.0, 1.5] {
        let rate = match LearningRate::new(0.1, schedule, warmup) {
            Ok(rate) => rate,
            Err(error) => {
                check_error(&error);
                continue;
            }
        };
        for (steps_per_epoch, steps) in [(0, 0), (1, 1), (10, 100), (usize::MAX, usize::MAX)] {
            for step in [0, 1, 9, 50, 99, 100, usize::MAX - 1] {
                let rate = rate.at(Progress { step, steps_per_epoch, steps });
                assert!(rate >= 0.0, "a rate of {rate} by {schedule}");
            }
        }
        let json = serde_json::to_string(&rate).expect("a rate has a JSON form");
        assert_eq!(serde_json::from_str::<LearningRate>(&json).expect("what was written is read"), rate);
    }
}
