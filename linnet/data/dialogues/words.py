"""The vocabulary of generated dialogues."""


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text."""
    return tuple(text.split())


ADJECTIVES = words(
    """
    amber big black blue bright broken brown calm clean cold copper crooked curved dark deep dry
    dusty empty faded fancy flat fresh gold gray green heavy hidden hollow iron large light little
    long loud low lucky narrow new old open orange pale pink plain purple quick quiet red round
    rusty sharp short silent silver simple slow small smooth soft square steel still strong sweet
    tall thin tiny warm white wide wild wooden yellow young
    """
)
THINGS = words(
    """
    apple bag ball basket bell bench boat book bottle box bridge brush button cabin camera candle
    car card cart chair chest clock coat coin cup desk door drum engine fan flag flute gate glass
    hammer hat horn jar kettle key kite knife ladder lamp lantern letter lock map mirror needle
    notebook oven paper pen piano plate pot radio ring robot rope safe saw ship shoe spoon stamp
    stone stove table tent ticket torch tower toy tray truck tunnel umbrella vase violin wagon
    wallet watch wheel whistle window
    """
)
PLACES = words(
    """
    attic bakery barn basement cafe castle cave church cinema court farm field forest garage
    garden hall harbor hospital hotel house island kitchen lake library market mill mine museum
    office park pool port river road room school shop stable station store street theater tower
    town valley village yard
    """
)
PEOPLE = words(
    """
    actor artist baker boy captain carpenter clerk cook dancer doctor driver farmer fisher girl
    guard hunter judge king lawyer man miller neighbor nurse painter pilot poet queen sailor
    singer smith soldier student tailor teacher waiter woman writer
    """
)
NAMES = words(
    """
    Ada Alan Alice Anna Ben Bella Boris Carla Carlos Clara Dan David Diana Dora Emil Emma Erik Eva
    Felix Fiona Frank George Grace Greta Hugo Ida Igor Inga Ivan Jack Jane Jonas Julia Karl Kate
    Kim Laura Leo Lena Linus Lisa Louis Lucy Marco Maria Max Mia Mona Nadia Nina Noah Nora Olga
    Oscar Otto Paul Peter Pia Rita Robert Rosa Ruth Sam Sara Simon Sofia Stella Tara Theo Thomas
    Tina Tom Ursula Vera Victor Walter Wanda Yusuf Zoe
    """
)
CITIES = words(
    """
    Athens Berlin Bern Bonn Boston Cairo Chicago Cork Dallas Delhi Denver Dublin Florence Geneva
    Hamburg Hanoi Havana Helsinki Istanbul Kiel Kyoto Lagos Lima Lisbon London Lyon Madrid Malmo
    Manila Milan Moscow Mumbai Munich Nairobi Naples Nice Oslo Osaka Ottawa Oxford Paris Porto
    Prague Quito Riga Rome Salem Santiago Seoul Seville Sofia Sydney Tokyo Toronto Turin Venice
    Vienna Warsaw York Zurich
    """
)
COUNTRIES = words(
    """
    Austria Brazil Canada Chile China Cuba Denmark Egypt France Germany Greece India Italy Japan
    Kenya Mexico Norway Peru Poland Spain Sweden Turkey
    """
)
VERBS = words(
    """
    breaks buys carries cleans drops fills finds fixes hides holds keeps likes lifts loses makes
    moves needs opens paints pulls pushes sells sees takes turns washes wants
    """
)
WEATHER = words(
    """
    sunny cloudy rainy windy foggy snowy stormy clear
    """
)
COLORS = words(
    """
    red blue green yellow black white brown gray pink purple orange silver gold
    """
)
FOODS = words(
    """
    apples bananas beans bread butter cake carrots cheese cherries corn eggs fish grapes honey
    lemons milk mushrooms nuts olives onions oranges pasta pears peas pizza plums potatoes rice
    salad soup tea tomatoes
    """
)
ANIMALS = words(
    """
    bear bird camel cat cow crow deer dog donkey duck eagle fox frog goat goose hen horse lion
    mouse owl parrot pig rabbit rat seal sheep snake spider swan tiger turtle wolf
    """
)
SYLLABLES = words(
    """
    ba be bo da de do fa fi ga go ha ka ki ko la le li lo ma me mi mo na ne ni no pa pe po ra re
    ri ro sa se si so ta ti tu to va ve vi vo za zo
    """
)
