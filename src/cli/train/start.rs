//! Level 7. From arguments to a solver: a new training, or one that was saved.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cli::data::{Folder, Opened, Wanted, check_fits};
use crate::cli::output::Output;
use crate::cli::presets::{self, Facts, Preset};
use crate::cli::recipe::{Choices, Dtype, Recipe};
use crate::cli::runs;
use crate::cli::{Global, Stop};
use crate::data::files::Format;
use crate::data::{Dataset, Normalization, Source, Split};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::nn::init::Init;
use crate::nn::network::Network;
use crate::nn::notation::NetworkSpec;
use crate::train::{Checkpoint, Solver, Trained};

/// What is said about a training: on the command line, and before that in a config.toml.
pub(in crate::cli) struct Said<'a> {
    choices: &'a Choices,
    preset: Option<&'a str>,
    /// Of the file that is given, or of the run that goes on; empty without one.
    config: Choices,
    pub(in crate::cli) data_dir: Option<PathBuf>,
    pub(in crate::cli) seed: u64,
}

impl<'a> Said<'a> {
    /// With this `config`, or that of the folder that is to `resume`, whose seed stays.
    pub(in crate::cli) fn new(
        choices: &'a Choices,
        preset: Option<&'a str>,
        config: Option<&Path>,
        resume: Option<&Path>,
        global: &Global,
    ) -> Result<Self> {
        let path = config.map(Path::to_owned).or(resume.map(runs::config));
        let config = path.as_deref().map_or(Ok(Choices::default()), Choices::read)?;
        if let (Some(seed), Some(of_run), Some(_)) = (global.seed, config.seed, resume)
            && seed != of_run
        {
            return Err(Error::invalid("seed", format!("{seed} is not that of the run, {of_run}"), "leave it out"));
        }
        let data_dir = global.data_dir.clone().or_else(|| config.data_dir.clone());
        let seed = global.seed.or(config.seed).unwrap_or(0);
        Ok(Said { choices, preset, config, data_dir, seed })
    }

    pub(in crate::cli) fn dtype(&self) -> Dtype {
        self.choices.dtype.or(self.config.dtype).unwrap_or(Dtype::F32)
    }

    fn train_limit(&self) -> Option<usize> {
        self.choices.train_limit.or(self.config.train_limit)
    }

    fn strict(&self) -> bool {
        self.choices.strict || self.config.strict
    }

    fn wanted(&self) -> Wanted {
        let size = self.choices.image_size.or(self.config.image_size);
        Wanted { size: size.map(|side| [side; 2]), strict: self.strict() }
    }

    /// The preset to start from; `own` says that the data is other than CIFAR-10.
    fn start_from(&self, own: bool) -> Result<&'static Preset> {
        let net = self.choices.net.as_ref().or(self.config.net.as_ref());
        let default = match (own, net) {
            (true, _) => presets::OWN,
            (false, Some(_)) => presets::PLAIN,
            (false, None) => presets::DEFAULT,
        };
        presets::find(self.preset.unwrap_or(default))
    }

    /// `base` with what is said in its place.
    fn recipe(&self, base: &Recipe) -> Result<Recipe> {
        base.with(&self.config)?.with(self.choices)
    }

    fn data(&self, source: Arc<dyn Source>, normalization: Normalization) -> Result<Dataset> {
        let data = Dataset::new(source, normalization)?;
        match self.train_limit() {
            Some(samples) => data.limit(Split::Train, samples),
            None => Ok(data),
        }
    }
}

/// Data that is open, and where it is.
pub(in crate::cli) struct Place {
    pub(in crate::cli) folder: Folder,
    pub(in crate::cli) opened: Opened,
}

impl Place {
    fn open(folder: Folder, wanted: Wanted, out: &Output) -> Result<Arc<Self>> {
        Ok(Arc::new(Place { opened: folder.open(wanted, out)?, folder }))
    }

    pub(in crate::cli) fn facts(&self) -> Facts {
        let source = &self.opened.source;
        Facts { dim: source.dim(), classes: source.class_names().len(), images: source.len(Split::Train) }
    }
}

/// A solver with its data.
pub(in crate::cli) struct Ready<T: Element> {
    pub(in crate::cli) solver: Solver<T>,
    pub(in crate::cli) place: Arc<Place>,
    pub(in crate::cli) recipe: Recipe,
    /// The one that a new training started from.
    pub(in crate::cli) preset: Option<&'static Preset>,
    /// The text of its config.toml.
    pub(in crate::cli) config: String,
}

impl<T: Element> Ready<T> {
    fn new(
        solver: Solver<T>,
        place: Arc<Place>,
        recipe: Recipe,
        preset: Option<&'static Preset>,
        said: &Said<'_>,
    ) -> Result<Self> {
        let config = config(&recipe, said, &place, solver.checkpoint().options.seed)?;
        Ok(Ready { solver, place, recipe, preset, config })
    }
}

/// What new trainings start from.
pub(in crate::cli) struct Base {
    pub(in crate::cli) place: Arc<Place>,
    pub(in crate::cli) preset: &'static Preset,
    pub(in crate::cli) recipe: Recipe,
}

impl Base {
    /// Opens the data, and downloads it before if need be. `check` is asked before that whether the recipe is possible, with what
    /// is known by then.
    pub(in crate::cli) fn open(
        said: &Said<'_>,
        fetch: bool,
        check: impl Fn(&Recipe, Option<Facts>) -> Result<()>,
        out: &Output,
    ) -> Result<Self, Stop> {
        let given = said.data_dir.clone().map(Folder::given).transpose()?;
        let own = given.as_ref().is_some_and(|folder| folder.format != Format::Cifar10);
        let preset = said.start_from(own)?;
        let here = given.is_none().then_some(Facts::CIFAR10);
        check(&said.recipe(&preset.example())?, here)?;
        let folder = given.map_or_else(|| Folder::find(fetch, out), Ok)?;
        let place = Place::open(folder, said.wanted(), out)?;
        let recipe = said.recipe(&preset.fit(place.facts()))?;
        Ok(Base { place, preset, recipe })
    }

    /// A training by this recipe.
    pub(in crate::cli) fn ready<T: Element>(&self, recipe: Recipe, said: &Said<'_>, seed: u64) -> Result<Ready<T>> {
        let network = network(&recipe, self.place.facts(), seed)?;
        let solver = Solver::new(network, self.data(&recipe, said)?, recipe.options(seed)?)?;
        Ready::new(solver, self.place.clone(), recipe, Some(self.preset), said)
    }

    /// The same where a checkpoint of it was.
    pub(in crate::cli) fn resumed<T: Element>(
        &self,
        recipe: Recipe,
        said: &Said<'_>,
        mut checkpoint: Checkpoint<T>,
    ) -> Result<Ready<T>> {
        checkpoint.options = recipe.options(checkpoint.options.seed)?;
        let solver = Solver::resume(checkpoint, self.data(&recipe, said)?)?;
        Ready::new(solver, self.place.clone(), recipe, Some(self.preset), said)
    }

    fn data(&self, recipe: &Recipe, said: &Said<'_>) -> Result<Dataset> {
        said.data(self.place.opened.source.clone(), recipe.normalization())
    }
}

/// A new training. What the user typed is checked before anything is downloaded or decoded.
pub(super) fn new<T: Element>(said: &Said<'_>, fetch: bool, out: &Output) -> Result<Ready<T>, Stop> {
    let check = |recipe: &Recipe, facts| check::<T>(recipe, facts, said.seed);
    let base = Base::open(said, fetch, check, out)?;
    Ok(base.ready(base.recipe.clone(), said, said.seed)?)
}

/// Whether a network can be trained by this recipe, as far as that can be told.
pub(in crate::cli) fn check<T: Element>(recipe: &Recipe, facts: Option<Facts>, seed: u64) -> Result<()> {
    let options = recipe.options(seed)?;
    recipe.init.parse::<Init>()?;
    NetworkSpec::parse(&recipe.net)?;
    let Some(facts) = facts else { return Ok(()) };
    options.check(facts.dim)?;
    network::<T>(recipe, facts, seed).map(drop)
}

/// The network of a recipe.
fn network<T: Element>(recipe: &Recipe, facts: Facts, seed: u64) -> Result<Network<T>> {
    let net = &recipe.net;
    let network = Network::new(&NetworkSpec::parse(net)?, facts.dim, recipe.init.parse()?, seed)?;
    if network.classes() != facts.classes {
        let (scores, classes) = (network.classes(), facts.classes);
        let problem = format!("it gives {scores} scores, the data has {classes} classes");
        let last = format!("affine{scores}");
        let fix = match net.rsplit_once(&last) {
            Some((before, after)) => format!("end it with affine{classes}: --net '{before}affine{classes}{after}'"),
            None => format!("end it with affine{classes}"),
        };
        return Err(Error::invalid("network", problem, fix));
    }
    Ok(network)
}

/// A run that goes on, with the options that were given again.
pub(super) fn resumed<T: Element>(dir: &Path, said: &Said<'_>, out: &Output) -> Result<Ready<T>, Stop> {
    let recipe = said.config.recipe(&runs::config(dir))?.with(said.choices)?;
    let (from, mut checkpoint) = runs::load_checkpoint::<T>(dir)?;
    checkpoint.options = recipe.options(said.seed)?;
    let Trained { network, class_names, .. } = &checkpoint.trained;
    let folder = Folder::of_classes(class_names, said.data_dir.as_deref())?;
    let wanted = folder.like(network, said.strict());
    let place = Place::open(folder, wanted, out)?;
    // The solver puts the checkpoint's normalisation in the place of this one.
    let data = said.data(place.opened.source.clone(), Normalization::MeanImage)?;
    check_fits(&data, &place.folder, network, class_names, &from)?;
    let solver = Solver::resume(checkpoint, data)?;
    Ok(Ready::new(solver, place, recipe, None, said)?)
}

/// The text of a config.toml: all that is needed to train by this recipe again.
pub(in crate::cli) fn config(recipe: &Recipe, said: &Said<'_>, place: &Place, seed: u64) -> Result<String> {
    let Place { folder, opened } = place;
    let choices = Choices {
        // As it is found from anywhere; none if it will not be there any more.
        data_dir: folder.lasting().map(|dir| dir.canonicalize().unwrap_or_else(|_| dir.to_owned())),
        seed: Some(seed),
        dtype: Some(said.dtype()),
        train_limit: said.train_limit(),
        image_size: (folder.format == Format::Pictures).then(|| opened.source.dim()[1]),
        strict: said.strict(),
        ..recipe.choices()
    };
    let text = choices.text()?;
    Ok(format!(
        "# gemmnet train --config FILE trains the same again, on the same kind of processor to the bit.\n{text}"
    ))
}
