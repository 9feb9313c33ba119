//! Level 7. Recipes by name; presets.toml has them.

use std::sync::LazyLock;

use serde::Deserialize;
use toml::Table;

use super::recipe::{FlipName, Recipe};
use crate::data::cifar10;
use crate::error::{Error, Result};

/// A recipe with a name.
#[derive(Clone, Debug)]
pub(super) struct Preset {
    pub(super) name: String,
    /// One line about it.
    pub(super) about: String,
    pub(super) recipe: Recipe,
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

/// What `train` does if no preset is asked for.
pub(super) const DEFAULT: &str = if cfg!(feature = "blas") { "sprint" } else { PLAIN };

/// What a network of the user's own is trained with if no preset is asked for.
pub(super) const PLAIN: &str = "three-layer-65";

/// What `train` does with data other than CIFAR-10 if no preset is asked for.
pub(super) const OWN: &str = "own";

/// Images that a training on data of one's own looks at in all epochs.
const OWN_IMAGES: f64 = 200_000.0;

impl Preset {
    /// The recipe for such data.
    pub(super) fn fit(&self, facts: Facts) -> Recipe {
        if self.name != OWN {
            return self.recipe.clone();
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
        let flip = if channels == 3 { FlipName::Random } else { FlipName::None };
        Recipe { net, epochs, batch_size, flip, shift: shortest / 16, ..self.recipe.clone() }
    }

    /// The recipe as it is explained: for CIFAR-10.
    pub(super) fn example(&self) -> Recipe {
        self.fit(Facts::CIFAR10)
    }
}

/// All of them.
pub(super) fn all() -> &'static [Preset] {
    static PRESETS: LazyLock<Vec<Preset>> =
        LazyLock::new(|| read(include_str!("presets.toml")).expect("presets.toml is a part of the program"));
    &PRESETS
}

/// The preset of this name.
pub(super) fn find(name: &str) -> Result<&'static Preset> {
    all().iter().find(|preset| preset.name == name).ok_or_else(|| {
        let names: Vec<&str> = all().iter().map(|preset| preset.name.as_str()).collect();
        Error::invalid("preset", format!("`{name}` is not one"), format!("choose one of {}", names.join(", ")))
    })
}

fn read(text: &str) -> Result<Vec<Preset>, toml::de::Error> {
    #[derive(Deserialize)]
    struct File {
        preset: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        name: String,
        about: String,
        base: Option<String>,
        #[serde(flatten)]
        said: Table,
    }
    /// What an entry says, above what its base says.
    fn said(entries: &[Entry], entry: &Entry) -> Table {
        let base = entries.iter().find(|base| entry.base.as_ref() == Some(&base.name));
        let mut table = base.map_or_else(Table::new, |base| said(entries, base));
        table.extend(entry.said.clone());
        table
    }
    let File { preset: entries } = toml::from_str(text)?;
    let preset = |entry: &Entry| {
        Ok(Preset { name: entry.name.clone(), about: entry.about.clone(), recipe: said(&entries, entry).try_into()? })
    };
    entries.iter().map(preset).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::init::Init;
    use crate::nn::network::Network;
    use crate::nn::notation::NetworkSpec;

    #[test]
    fn every_preset_can_be_read() {
        for preset in all() {
            let recipe = preset.example();
            NetworkSpec::parse(&recipe.net).unwrap();
            recipe.init.parse::<Init>().unwrap();
            recipe.options(0).unwrap();
        }
        assert_eq!(find(DEFAULT).unwrap().name, DEFAULT);
        assert_eq!(find(OWN).unwrap().name, OWN);
        assert!(find("four-layer").unwrap_err().to_string().contains("three-layer, three-layer-65, deep, resnet20"));
    }

    #[test]
    fn the_recipe_for_own_data_suits_images_of_any_size() {
        let fit = |dim, classes, images| find(OWN).unwrap().fit(Facts { dim, classes, images });
        for side in [1, 2, 5, 6, 8, 28, 32, 64, 96, 224, 640] {
            for dim in [[3, side, side], [1, side, side + 3], [2, side + 1, side]] {
                let recipe = fit(dim, 7, 100);
                let network = Network::<f32>::new(&recipe.net.parse().unwrap(), dim, Init::He, 0).unwrap();
                assert_eq!(network.classes(), 7);
                assert!(recipe.shift < side.max(1), "{dim:?}");
            }
        }
        let photos = fit([3, 64, 64], 5, 480);
        assert_eq!(
            photos.net,
            "[conv16-bn-relu]x2-pool-[conv32-bn-relu]x2-pool-[conv64-bn-relu]x2-pool-[conv128-bn-relu]x2-pool-gap-affine5"
        );
        assert_eq!((photos.epochs, photos.batch_size, photos.flip, photos.shift), (40.0, 32, FlipName::Random, 4));
        let digits = fit([1, 28, 28], 10, 54_000);
        assert_eq!(digits.net, "[conv32-bn-relu]x2-pool-[conv64-bn-relu]x2-pool-[conv128-bn-relu]x2-pool-gap-affine10");
        assert_eq!((digits.epochs, digits.batch_size, digits.flip, digits.shift), (4.0, 128, FlipName::None, 1));
        // Others are what they are.
        assert_eq!(find("deep").unwrap().example(), find("deep").unwrap().recipe);
    }
}
