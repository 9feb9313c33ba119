//! Level 7. Recipes by name.

use std::borrow::Cow;

use crate::data::cifar10;
use crate::data::{Augment, Fill, Flip, Normalization, Sampler};
use crate::error::{Error, Result};
use crate::train::Keep;

/// A network and how to train it. What has a text form is text here, as on the command line.
#[derive(Clone, Copy, Debug)]
pub(super) struct Preset {
    pub(super) name: &'static str,
    /// One line about it.
    pub(super) about: &'static str,
    /// Empty where it depends on the data: [`Preset::fit`].
    net: &'static str,
    pub(super) init: &'static str,
    pub(super) epochs: f64,
    pub(super) batch_size: usize,
    /// Groups of parameters with a rule of their own; the rest has the rule that follows.
    pub(super) groups: &'static [&'static str],
    pub(super) optimizer: &'static str,
    pub(super) learning_rate: f64,
    pub(super) schedule: &'static str,
    pub(super) warmup_epochs: f64,
    pub(super) l2: f64,
    pub(super) keep: Keep,
    pub(super) sampler: Sampler,
    pub(super) augment: Augment,
    pub(super) normalization: Normalization,
}

/// What a recipe may depend on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    /// `[C, H, W]` of the images.
    pub(super) dim: [usize; 3],
    pub(super) classes: usize,
    /// For training.
    pub(super) images: usize,
}

impl Facts {
    /// CIFAR-10's, and those of all that is read in its place.
    pub(super) const CIFAR10: Self = Facts { dim: cifar10::DIM, classes: cifar10::CLASSES, images: 49_000 };
}

impl Preset {
    /// The recipe for such data, and its network.
    pub(super) fn fit(&self, facts: Facts) -> (Preset, Cow<'static, str>) {
        if self.name != OWN.name {
            return (*self, self.net.into());
        }
        let Facts { dim: [channels, height, width], classes, images } = facts;
        let shortest = height.min(width);
        // Halved until little is left; twice the filters each time, 128 in the end.
        let stages = (0..6).take_while(|&stage| shortest >> stage >= 6).count();
        let stage = |stage: usize| format!("[conv{}-bn-relu]x2-pool-", 128 >> (stages - 1 - stage).min(3));
        let net = (0..stages).map(stage).collect::<String>() + &format!("gap-affine{classes}");
        let net = if stages == 0 { format!("conv64-bn-relu-gap-affine{classes}") } else { net };
        let epochs = (OWN_IMAGES / images.max(1) as f64).round().clamp(4.0, 40.0);
        let batch_size = if images < 10_000 { 32 } else { 128 };
        // Mirrored digits are others, mirrored photos are not.
        let flip = if channels == 3 { Flip::Random } else { Flip::None };
        let augment = Augment { flip, shift: shortest / 16, ..Augment::NONE };
        (Preset { epochs, batch_size, augment, ..*self }, net.into())
    }

    /// The options of `train` that say the same, with this network.
    pub(super) fn arguments(&self, net: &str) -> String {
        let sampler = match self.sampler {
            Sampler::ShuffledEpochs => "shuffle",
            Sampler::WithReplacement => "replacement",
        };
        let keep = match self.keep {
            Keep::Best => "best",
            Keep::Last => "last",
        };
        let normalization = match self.normalization {
            Normalization::MeanImage => "mean-image",
            Normalization::PerChannel => "per-channel",
        };
        let groups: String = self.groups.iter().map(|group| format!("--group {group} ")).collect();
        format!(
            "--net '{}' --init {} --epochs {} --batch-size {} {groups}--optimizer {} --learning-rate {} --schedule {} \
             --warmup-epochs {} --l2 {} --keep {keep} --sampler {sampler} {} --normalize {normalization}",
            net,
            self.init,
            self.epochs,
            self.batch_size,
            self.optimizer,
            self.learning_rate,
            self.schedule,
            self.warmup_epochs,
            self.l2,
            augmentation(self.augment),
        )
    }
}

/// The options of `train` for this augmentation.
fn augmentation(augment: Augment) -> String {
    let flip = match augment.flip {
        Flip::None => "none",
        Flip::Random => "random",
        Flip::Alternating => "alternating",
    };
    let fill = match augment.fill {
        Fill::Zeros => "",
        Fill::Reflect => " --shift-fill reflect",
    };
    let cutout = if augment.cutout == 0 { String::new() } else { format!(" --cutout {}", augment.cutout) };
    format!("--flip={flip} --shift {}{fill}{cutout}", augment.shift)
}

/// What `train` does if no preset is asked for.
pub(super) const DEFAULT: &str = if cfg!(feature = "blas") { "sprint" } else { PLAIN };

/// What `train` does with data other than CIFAR-10 if no preset is asked for.
pub(super) const OWN: Preset = Preset {
    name: "own",
    about: "for data of your own: network, epochs and batches by the size, number and classes of its images; here for CIFAR-10",
    net: "",
    init: "he",
    epochs: 40.0,
    batch_size: 32,
    groups: &[],
    optimizer: "adam",
    learning_rate: 2e-3,
    schedule: "onecycle:0.23:0.2:0",
    warmup_epochs: 0.0,
    l2: 0.0,
    keep: Keep::Last,
    sampler: Sampler::ShuffledEpochs,
    augment: Augment::NONE,
    normalization: Normalization::PerChannel,
};

/// Images that a training on data of one's own looks at in all epochs.
const OWN_IMAGES: f64 = 200_000.0;

/// What a network of the user's own is trained with if no preset is asked for.
pub(super) const PLAIN: &str = "three-layer-65";

/// Jordan's recipe for CIFAR-10 (2024, arXiv 2404.00498, in its version with Muon), of which the sprints are small sizes: a
/// whitening layer, batchnorm whose scale stays 1, filters that begin as the identity and are trained by Muon, a loss that is
/// summed, and rates that fall to 0. Decay is 2e-6 times the batch over the rate.
const RECORD: Preset = Preset {
    name: "record",
    about: "the recipe that holds the records for CIFAR-10, 8 epochs; PyTorch reaches 89.5 % of the test images with it",
    net: "whiten2-gelu-\
          conv64b0-pool-bn0.6g0-gelu-conv64b0-bn0.6g0-gelu-\
          conv256b0-pool-bn0.6g0-gelu-conv256b0-bn0.6g0-gelu-\
          conv256b0-pool-bn0.6g0-gelu-conv256b0-bn0.6g0-gelu-\
          pool3-affine10b0-div256-softmax0.2sum",
    init: "dirac",
    epochs: 8.0,
    batch_size: 2000,
    groups: &[
        "whiten1.bias=nesterov,lr=0.053,l2=0.0755,momentum=0.85,schedule=linear:3",
        "affine1.weight=nesterov,lr=0.67,l2=0.00597,momentum=0.85",
        MUON,
        "bias=nesterov,lr=0.053,l2=0.0755,momentum=0.85",
    ],
    optimizer: "nesterov",
    learning_rate: 0.24,
    schedule: "linear",
    warmup_epochs: 0.0,
    l2: 0.0,
    keep: Keep::Last,
    sampler: Sampler::ShuffledEpochs,
    augment: Augment { flip: Flip::Alternating, shift: 2, fill: Fill::Reflect, cutout: 0 },
    normalization: Normalization::PerChannel,
};

/// The rule of filters in the record's recipe.
const MUON: &str = "weight=muon,lr=0.24,momentum=0.6,iterations=3,fixed_norm=true";

/// The groups of head and biases for batches of 500. The recipe's decay, rate times strength of L2, is 2e-6 for each image of
/// a batch.
const HEAD_OF_500: &str = "affine1.weight=nesterov,lr=0.67,l2=0.00149,momentum=0.85";
const BIASES_OF_500: &str = "bias=nesterov,lr=0.053,l2=0.0189,momentum=0.85";

pub(super) const PRESETS: [Preset; 9] = [
    Preset {
        name: "sprint",
        about: "65 % in about five seconds: 0.26 epochs of a small network by the record's recipe",
        net: "whiten3s2-gelu-\
              conv64b0-pool-bn0.6g0-gelu-conv64b0-bn0.6g0-gelu-\
              conv128b0-pool-bn0.6g0-gelu-conv128b0-bn0.6g0-gelu-\
              pool3-affine10b0-div128-softmax0.2sum",
        epochs: 0.26,
        batch_size: 125,
        groups: &[
            "whiten1.bias=frozen",
            "affine1.weight=nesterov,lr=0.67,l2=0.000373,momentum=0.85",
            MUON,
            "bias=nesterov,lr=0.053,l2=0.00472,momentum=0.85",
        ],
        augment: Augment { flip: Flip::Alternating, ..Augment::NONE },
        ..RECORD
    },
    Preset {
        name: "sprint-75",
        about: "75 % of the test images in less than 15 seconds, in one epoch",
        net: "whiten3s2-gelu-\
              conv64b0-pool-bn0.6g0-gelu-conv64b0-bn0.6g0-gelu-\
              conv128b0-pool-bn0.6g0-gelu-conv128b0-bn0.6g0-gelu-\
              conv128b0-bn0.6g0-gelu-\
              pool3-affine10b0-div128-softmax0.2sum",
        epochs: 1.0,
        batch_size: 500,
        groups: &["whiten1.bias=frozen", HEAD_OF_500, MUON, BIASES_OF_500],
        augment: Augment { flip: Flip::Alternating, ..Augment::NONE },
        ..RECORD
    },
    Preset {
        name: "sprint-85",
        about: "85 % of the test images in less than 150 seconds, in 5 epochs",
        net: "whiten2-gelu-\
              conv24b0-pool-bn0.6g0-gelu-conv24b0-bn0.6g0-gelu-\
              conv128b0-pool-bn0.6g0-gelu-conv128b0-bn0.6g0-gelu-\
              conv128b0-pool-bn0.6g0-gelu-conv128b0-bn0.6g0-gelu-\
              pool3-affine10b0-div128-softmax0.2sum",
        epochs: 5.0,
        batch_size: 500,
        groups: &[
            "whiten1.bias=nesterov,lr=0.053,l2=0.0189,momentum=0.85,schedule=linear:3",
            HEAD_OF_500,
            MUON,
            BIASES_OF_500,
        ],
        ..RECORD
    },
    RECORD,
    Preset {
        name: "three-layer",
        about: "CS231n's three-layer network and its first training: one epoch, 45 % and more",
        net: "conv32k7-relu-pool-affine500-relu-affine10",
        init: "gaussian:0.001",
        epochs: 1.0,
        batch_size: 50,
        groups: &[],
        optimizer: "adam",
        learning_rate: 1e-3,
        schedule: "constant",
        warmup_epochs: 0.0,
        l2: 0.001,
        keep: Keep::Best,
        sampler: Sampler::ShuffledEpochs,
        augment: Augment::NONE,
        normalization: Normalization::MeanImage,
    },
    Preset {
        name: "three-layer-65",
        about: "the three-layer network with 64 filters of 3x3: passes 65 % in 8 epochs",
        net: "conv64-relu-pool-affine500-relu-affine10",
        init: "gaussian:0.001",
        epochs: 8.0,
        batch_size: 500,
        groups: &[],
        optimizer: "adam",
        learning_rate: 1e-3,
        schedule: "exp:0.9",
        warmup_epochs: 0.0,
        l2: 0.0015,
        keep: Keep::Best,
        sampler: Sampler::ShuffledEpochs,
        augment: Augment::NONE,
        normalization: Normalization::MeanImage,
    },
    Preset {
        name: "deep",
        about: "six convolutions with batchnorm, augmented data: passes 72 % in 5 epochs",
        net: "[conv32-bn-relu-conv32-bn-relu-pool]x3-[affine256-bn-relu-dropout0.5]-affine10",
        init: "he",
        epochs: 5.0,
        batch_size: 100,
        groups: &[],
        optimizer: "adam",
        learning_rate: 2e-3,
        schedule: "onecycle",
        warmup_epochs: 0.0,
        l2: 0.0,
        keep: Keep::Best,
        sampler: Sampler::ShuffledEpochs,
        augment: Augment { flip: Flip::Random, shift: 2, ..Augment::NONE },
        normalization: Normalization::PerChannel,
    },
    Preset {
        name: "resnet20",
        about: "ResNet-20 (He et al. 2016) with projections, augmented data: passes 70 % in 5 epochs",
        net: "conv16-bn-relu-[res[conv16-bn-relu-conv16-bn]-relu]x3-res[conv32s2p1-bn-relu-conv32-bn]-relu-\
              [res[conv32-bn-relu-conv32-bn]-relu]x2-res[conv64s2p1-bn-relu-conv64-bn]-relu-\
              [res[conv64-bn-relu-conv64-bn]-relu]x2-gap-affine10",
        init: "he",
        epochs: 5.0,
        batch_size: 128,
        groups: &[],
        optimizer: "momentum",
        learning_rate: 0.1,
        schedule: "onecycle",
        warmup_epochs: 0.0,
        l2: 5e-4,
        keep: Keep::Best,
        sampler: Sampler::ShuffledEpochs,
        augment: Augment { flip: Flip::Random, shift: 4, ..Augment::NONE },
        normalization: Normalization::PerChannel,
    },
    OWN,
];

/// A preset as it is explained, for CIFAR-10, and its network.
pub(super) fn example(preset: &Preset) -> (Preset, Cow<'static, str>) {
    preset.fit(Facts::CIFAR10)
}

/// The preset of this name.
pub(super) fn find(name: &str) -> Result<&'static Preset> {
    PRESETS.iter().find(|preset| preset.name == name).ok_or_else(|| {
        let names = PRESETS.map(|preset| preset.name).join(", ");
        Error::invalid("preset", format!("`{name}` is not one"), format!("choose one of {names}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::init::Init;
    use crate::nn::network::Network;
    use crate::nn::notation::NetworkSpec;
    use crate::optim::{LearningRate, Schedule, UpdateRule};

    #[test]
    fn every_preset_can_be_read() {
        for preset in PRESETS {
            NetworkSpec::parse(&example(&preset).1).unwrap();
            preset.init.parse::<Init>().unwrap();
            preset.optimizer.parse::<UpdateRule>().unwrap();
            let schedule: Schedule = preset.schedule.parse().unwrap();
            LearningRate::new(preset.learning_rate, schedule, preset.warmup_epochs).unwrap();
        }
        assert_eq!(augmentation(Augment::NONE), "--flip=none --shift 0");
        let all = Augment { flip: Flip::Alternating, shift: 2, fill: Fill::Reflect, cutout: 8 };
        assert_eq!(augmentation(all), "--flip=alternating --shift 2 --shift-fill reflect --cutout 8");
        assert_eq!(find(DEFAULT).unwrap().name, DEFAULT);
        assert!(find("four-layer").unwrap_err().to_string().contains("three-layer, three-layer-65, deep, resnet20"));
    }

    #[test]
    fn the_recipe_for_own_data_suits_images_of_any_size() {
        let fit = |dim, classes, images| OWN.fit(Facts { dim, classes, images });
        for side in [1, 2, 5, 6, 8, 28, 32, 64, 96, 224, 640] {
            for dim in [[3, side, side], [1, side, side + 3], [2, side + 1, side]] {
                let (preset, net) = fit(dim, 7, 100);
                let network = Network::<f32>::new(&net.parse().unwrap(), dim, Init::He, 0).unwrap();
                assert_eq!(network.classes(), 7);
                assert!(preset.augment.shift < side.max(1), "{dim:?}");
            }
        }
        let (photos, net) = fit([3, 64, 64], 5, 480);
        assert_eq!(
            net,
            "[conv16-bn-relu]x2-pool-[conv32-bn-relu]x2-pool-[conv64-bn-relu]x2-pool-[conv128-bn-relu]x2-pool-gap-affine5"
        );
        assert_eq!(
            (photos.epochs, photos.batch_size, photos.augment.flip, photos.augment.shift),
            (40.0, 32, Flip::Random, 4)
        );
        let (digits, net) = fit([1, 28, 28], 10, 54_000);
        assert_eq!(net, "[conv32-bn-relu]x2-pool-[conv64-bn-relu]x2-pool-[conv128-bn-relu]x2-pool-gap-affine10");
        assert_eq!(
            (digits.epochs, digits.batch_size, digits.augment.flip, digits.augment.shift),
            (4.0, 128, Flip::None, 1)
        );
        // Others are what they are.
        assert_eq!(find("deep").unwrap().fit(Facts::CIFAR10).1, find("deep").unwrap().net);
    }
}
