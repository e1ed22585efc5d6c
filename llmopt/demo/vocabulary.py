"""The words of the stories. In each list the first word is the most frequent, by the law of Zipf and Mandelbrot."""

from llmopt.demo.choices import Choice, either, zipf


def words(text: str) -> Choice:
    """A choice among the words of a text."""
    return zipf(text.split())


def phrases(text: str) -> Choice:
    """A choice among the phrases of a text, which bars separate."""
    return zipf(" ".join(phrase.split()) for phrase in text.split("|"))


def with_article(choice: Choice) -> Choice:
    """The same options as `a baker`, `an innkeeper`: the article is told by what follows, so both are drawn at once."""
    vowel = ("a", "e", "i", "o", "u", "honest")
    return choice.map(lambda option: f"{'an' if option.startswith(vowel) else 'a'} {option}")


def with_the(choice: Choice) -> Choice:
    """The same options as `the baker`, `the innkeeper`."""
    return choice.map(lambda option: f"the {option}")


def plural(choice: Choice) -> Choice:
    """The same nouns, more than one of each."""
    return choice.map(lambda option: f"{option}s")


WOMEN = words(
    "Mira Anna Clara Ruth Ida Nora Elsa Lena Tilda Greta Vera Oda Hanna Sofia Agnes Petra Edith Martha Judith Ilse "
    "Marion Bertha Winifred Ottilie"
)
MEN = words(
    "Tom Jonas Emil Peter Oskar Felix Hugo Karl Anton Matti Bruno Simon Arvid Kaspar Theo Ivan Ludwig Rufus Gregor "
    "Albert Conrad Leopold Barnaby Sylvester"
)


PEOPLE = either((0.5, WOMEN), (0.5, MEN))


def pronoun(name: str) -> str:
    """Of a person, as the subject of a sentence."""
    return "she" if name in WOMEN.options else "he"


def possessive(name: str) -> str:
    """What belongs to a person: `her brother`."""
    return "her" if name in WOMEN.options else "his"


def people_called(relation: str) -> Choice:
    """The names that fit: a sister has a woman's, a friend has any."""
    if relation in ("sister", "aunt", "daughter", "niece"):
        return WOMEN
    return MEN if relation in ("brother", "uncle", "son", "nephew") else PEOPLE


TOWNS = words(
    "Harrow Linden Elmsford Greywater Ashby Dunmore Westcliff Oakham Millbrook Thornbury Larkhill Stonebridge Fernley "
    "Saltmarsh Kingsferry Hollowell Brackenridge Winterbourne Ravenglass Southmoor Eastwick Highgate"
)
SETTINGS = words("in near above outside below beyond behind")
LIVED = words("lived worked dwelt slept grew")

ADJECTIVES = words(
    "old young poor clever quiet brave tall honest lazy proud kind clumsy stubborn cheerful lonely patient wise shy "
    "greedy gentle curious careless rich thin loud polite sleepy bold grumpy famous absent-minded ill-tempered"
)
TRADES = words(
    "baker farmer miller fisherman weaver smith carpenter teacher tailor shepherd clockmaker gardener potter hunter "
    "sailor cobbler doctor innkeeper painter beekeeper musician ferryman bookbinder lighthouse-keeper judge cook "
    "thief soldier priest student dancer poet"
)
RELATIONS = words("sister brother friend cousin aunt uncle neighbor daughter son partner niece nephew")

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
HOW_MANY = words("three five two seven four nine six one eight twelve ten eleven")
COLORS = words("red blue green white black yellow silver golden brown purple broken wooden painted rusty tiny heavy")
THINGS = words(
    "apple coin lamp book egg candle letter basket bottle ring button map key rope drum feather pearl hat blanket "
    "bell mirror barrel pumpkin whistle needle lantern kettle saddle ribbon marble chair clock spoon boot shirt pillow "
    "flute violin shovel hammer wheel ladder onion carrot turnip stamp umbrella telescope"
)
ANIMALS = words("dog cat goat horse crow donkey fox goose rabbit hen owl hedgehog pig duck sheep ferret")
PETS = words(
    "Bello Mop Juno Pepper Argus Biscuit Snow Max Tinker Rusty Clover Shadow Pickle Duchess Thunder Button Pasha Ginger"
)

PLACES = words(
    "market river mill forest church bridge inn harbor well castle garden meadow school tower lake orchard mountain "
    "crossroads windmill cemetery quarry monastery waterfall vineyard station library bakery stable swamp cave beach "
    "lighthouse"
)
QUALITIES = words(
    "old dark empty frozen ruined sunny distant narrow haunted crowded deserted flooded quiet burning snowy royal "
    "forgotten hidden noisy muddy"
)

OWNED = words("had owned kept loved carried guarded hid")
WAYS = words(
    "slowly quietly quickly alone gladly barefoot sadly happily carefully together straight backwards proudly secretly"
)
GOING = words("went walked hurried marched wandered rode crept ran climbed danced drove limped")
TOWARDS = words("to toward past around through into across behind")
FOLLOWING = words("followed waited slept barked hid vanished listened stayed")
GIVING = words("gave sold lent sent promised offered mailed threw")
GETTING = words("found bought received borrowed won stole dug collected")
SEEING = words("saw noticed counted painted passed dropped admired wanted")
MEETING = words("met helped visited greeted feared followed married tricked")
ASKING = words("asked told warned questioned reminded taught")
FEELING = words("was felt seemed became looked")
FEELINGS = words(
    "happy sad tired angry hungry afraid worried glad bored cold restless jealous homesick ill calm thirsty"
)
DOING = words(
    "singing sleeping fishing crying dancing laughing reading digging whistling praying shouting juggling cooking "
    "swimming dreaming knitting"
)
NEAR = words("near behind at outside inside beside above below opposite")
REPLIES = words("laughed nodded agreed sighed wept shrugged smiled lied listened vanished argued blushed")
WEATHER = phrases(
    "the wind rose | snow fell | rain came | thunder rolled | fog settled | the stars came out | the sun rose"
)

NEXT = phrases(
    "then | soon | later | one day , | next morning , | before noon , | suddenly | again | at dusk , | on Sunday , | "
    "in spring , | that night , | afterwards"
)
LAST = phrases("at last | finally | in the end , | years later ,")

RETURNING = words("returned went came sailed rode moved walked")
CLOSING = phrases("ever since , | to this day , | today | even now")
TOWNSPEOPLE = phrases("everyone | people | the children | the neighbors | nobody | travelers | the mayor")
SAYING = words("remembered praised pitied mocked envied missed loved trusted")
