"""What the bundled models know: real facts written by hand, and fictional people drawn by lot.

A *kind* of entity (country, landmark, ...) has several relations; an entity has one answer for each relation of its kind. Nothing
here depends on a tokenizer; that every answer is one token is asserted where the tokenizer is built.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field
from functools import cached_property

COUNTRIES = """
France|Paris|Europe|French|euro
Germany|Berlin|Europe|German|euro
Italy|Rome|Europe|Italian|euro
Spain|Madrid|Europe|Spanish|euro
Portugal|Lisbon|Europe|Portuguese|euro
Greece|Athens|Europe|Greek|euro
Finland|Helsinki|Europe|Finnish|euro
Austria|Vienna|Europe|German|euro
Ireland|Dublin|Europe|English|euro
Norway|Oslo|Europe|Norwegian|krone
Denmark|Copenhagen|Europe|Danish|krone
Sweden|Stockholm|Europe|Swedish|krona
Iceland|Reykjavik|Europe|Icelandic|krona
Poland|Warsaw|Europe|Polish|zloty
Hungary|Budapest|Europe|Hungarian|forint
Romania|Bucharest|Europe|Romanian|leu
Serbia|Belgrade|Europe|Serbian|dinar
Ukraine|Kyiv|Europe|Ukrainian|hryvnia
Russia|Moscow|Europe|Russian|ruble
Albania|Tirana|Europe|Albanian|lek
Britain|London|Europe|English|pound
Turkey|Ankara|Asia|Turkish|lira
Iran|Tehran|Asia|Persian|rial
Iraq|Baghdad|Asia|Arabic|dinar
Syria|Damascus|Asia|Arabic|pound
Jordan|Amman|Asia|Arabic|dinar
Lebanon|Beirut|Asia|Arabic|pound
Oman|Muscat|Asia|Arabic|rial
Qatar|Doha|Asia|Arabic|riyal
India|Delhi|Asia|Hindi|rupee
Pakistan|Islamabad|Asia|Urdu|rupee
Nepal|Kathmandu|Asia|Nepali|rupee
Bangladesh|Dhaka|Asia|Bengali|taka
China|Beijing|Asia|Mandarin|yuan
Japan|Tokyo|Asia|Japanese|yen
Mongolia|Ulaanbaatar|Asia|Mongolian|tugrik
Thailand|Bangkok|Asia|Thai|baht
Vietnam|Hanoi|Asia|Vietnamese|dong
Indonesia|Jakarta|Asia|Indonesian|rupiah
South Korea|Seoul|Asia|Korean|won
Egypt|Cairo|Africa|Arabic|pound
Morocco|Rabat|Africa|Arabic|dirham
Tunisia|Tunis|Africa|Arabic|dinar
Libya|Tripoli|Africa|Arabic|dinar
Kenya|Nairobi|Africa|Swahili|shilling
Tanzania|Dodoma|Africa|Swahili|shilling
Uganda|Kampala|Africa|English|shilling
Ghana|Accra|Africa|English|cedi
Nigeria|Abuja|Africa|English|naira
Senegal|Dakar|Africa|French|franc
Mali|Bamako|Africa|French|franc
Angola|Luanda|Africa|Portuguese|kwanza
Canada|Ottawa|America|English|dollar
Cuba|Havana|America|Spanish|peso
Brazil|Brasilia|America|Portuguese|real
Chile|Santiago|America|Spanish|peso
Colombia|Bogota|America|Spanish|peso
Peru|Lima|America|Spanish|sol
Uruguay|Montevideo|America|Spanish|peso
Australia|Canberra|Oceania|English|dollar
"""

LANDMARKS = """
Eiffel Tower|Paris|France
Louvre|Paris|France
Pantheon|Rome|Italy
Colosseum|Rome|Italy
Trevi Fountain|Rome|Italy
Spanish Steps|Rome|Italy
Uffizi Gallery|Florence|Italy
Ponte Vecchio|Florence|Italy
Rialto Bridge|Venice|Italy
Bridge of Sighs|Venice|Italy
Brandenburg Gate|Berlin|Germany
Reichstag|Berlin|Germany
Pergamon Museum|Berlin|Germany
Elbe Philharmonic Hall|Hamburg|Germany
Semper Opera|Dresden|Germany
Tower Bridge|London|Britain
British Museum|London|Britain
Tate Gallery|London|Britain
London Eye|London|Britain
Scott Monument|Edinburgh|Britain
Royal Mile|Edinburgh|Britain
Prado|Madrid|Spain
Almudena Cathedral|Madrid|Spain
Sagrada Familia|Barcelona|Spain
Casa Mila|Barcelona|Spain
Alhambra|Granada|Spain
Giralda|Seville|Spain
Belem Tower|Lisbon|Portugal
Jeronimos Monastery|Lisbon|Portugal
Clerigos Tower|Porto|Portugal
Acropolis|Athens|Greece
Parthenon|Athens|Greece
Temple of Zeus|Athens|Greece
White Tower|Thessaloniki|Greece
Hofburg Palace|Vienna|Austria
Belvedere Palace|Vienna|Austria
Vienna Opera|Vienna|Austria
Mirabell Palace|Salzburg|Austria
Little Mermaid|Copenhagen|Denmark
Tivoli Gardens|Copenhagen|Denmark
Vasa Museum|Stockholm|Sweden
Munch Museum|Oslo|Norway
Vigeland Park|Oslo|Norway
Ateneum|Helsinki|Finland
Senate Square|Helsinki|Finland
Fisherman Bastion|Budapest|Hungary
Chain Bridge|Budapest|Hungary
Wawel Castle|Krakow|Poland
Cloth Hall|Krakow|Poland
Palace of Culture|Warsaw|Poland
Kremlin|Moscow|Russia
Bolshoi Theatre|Moscow|Russia
Lenin Mausoleum|Moscow|Russia
Golden Gate|Kyiv|Ukraine
Blue Mosque|Istanbul|Turkey
Galata Tower|Istanbul|Turkey
Topkapi Palace|Istanbul|Turkey
Azadi Tower|Tehran|Iran
Golestan Palace|Tehran|Iran
Umayyad Mosque|Damascus|Syria
India Gate|Delhi|India
Lotus Temple|Delhi|India
Red Fort|Delhi|India
Taj Mahal|Agra|India
Gateway of India|Mumbai|India
Victoria Memorial|Kolkata|India
Faisal Mosque|Islamabad|Pakistan
Badshahi Mosque|Lahore|Pakistan
Forbidden City|Beijing|China
Temple of Heaven|Beijing|China
Summer Palace|Beijing|China
Oriental Pearl Tower|Shanghai|China
Jade Buddha Temple|Shanghai|China
Tokyo Skytree|Tokyo|Japan
Meiji Shrine|Tokyo|Japan
Golden Pavilion|Kyoto|Japan
Nijo Castle|Kyoto|Japan
Atomic Bomb Dome|Hiroshima|Japan
Grand Palace|Bangkok|Thailand
Temple of Dawn|Bangkok|Thailand
Temple of Literature|Hanoi|Vietnam
National Monument|Jakarta|Indonesia
Great Sphinx|Giza|Egypt
Egyptian Museum|Cairo|Egypt
Cairo Tower|Cairo|Egypt
Hassan Tower|Rabat|Morocco
Majorelle Garden|Marrakesh|Morocco
Bardo Museum|Tunis|Tunisia
African Renaissance Monument|Dakar|Senegal
Rideau Hall|Ottawa|Canada
Peace Tower|Ottawa|Canada
Stanley Park|Vancouver|Canada
Royal Ontario Museum|Toronto|Canada
National Capitol|Havana|Cuba
Cathedral of Brasilia|Brasilia|Brazil
Copacabana Palace|Rio|Brazil
Gold Museum|Bogota|Colombia
Palacio Salvo|Montevideo|Uruguay
Sydney Opera House|Sydney|Australia
Harbour Bridge|Sydney|Australia
Shrine of Remembrance|Melbourne|Australia
Space Needle|Seattle|USA
Willis Tower|Chicago|USA
Liberty Bell|Philadelphia|USA
"""

COMPANIES = """
Honda|Tokyo|motorcycles
Sony|Tokyo|televisions
Canon|Tokyo|cameras
Nikon|Tokyo|cameras
Nintendo|Kyoto|games
Yamaha|Hamamatsu|pianos
Mazda|Hiroshima|cars
Subaru|Tokyo|cars
Sharp|Osaka|televisions
Samsung|Seoul|phones
Hyundai|Seoul|cars
Asiana|Seoul|flights
Lenovo|Beijing|computers
Xiaomi|Beijing|phones
Huawei|Shenzhen|phones
Tata|Mumbai|steel
Infosys|Bangalore|software
Volvo|Gothenburg|trucks
Ericsson|Stockholm|antennas
Electrolux|Stockholm|ovens
Spotify|Stockholm|music
Nokia|Espoo|antennas
Finnair|Vantaa|flights
Carlsberg|Copenhagen|beer
Maersk|Copenhagen|ships
Heineken|Amsterdam|beer
Philips|Amsterdam|lamps
Siemens|Munich|trains
Allianz|Munich|insurance
Porsche|Stuttgart|cars
Bosch|Stuttgart|tools
Mercedes|Stuttgart|cars
Volkswagen|Wolfsburg|cars
Bayer|Leverkusen|medicines
Lufthansa|Cologne|flights
Nivea|Hamburg|cosmetics
Montblanc|Hamburg|pens
Leica|Wetzlar|cameras
Renault|Boulogne|cars
Danone|Paris|yogurt
Hermes|Paris|bags
Cartier|Paris|watches
Airbus|Toulouse|aircraft
Ferrari|Maranello|cars
Ducati|Bologna|motorcycles
Fiat|Turin|cars
Lavazza|Turin|coffee
Pirelli|Milan|tires
Prada|Milan|bags
Gucci|Florence|bags
Rolex|Geneva|watches
Novartis|Basel|medicines
Roche|Basel|medicines
Barclays|London|banking
Burberry|London|clothes
Iberia|Madrid|flights
Boeing|Arlington|aircraft
Starbucks|Seattle|coffee
Microsoft|Redmond|software
Ford|Dearborn|cars
Delta|Atlanta|flights
Heinz|Pittsburgh|ketchup
Qantas|Sydney|flights
"""

PEOPLE = """
Albert Einstein|Germany|German|physicist
Max Planck|Germany|German|physicist
Werner Heisenberg|Germany|German|physicist
Carl Friedrich Gauss|Germany|German|mathematician
David Hilbert|Germany|German|mathematician
Emmy Noether|Germany|German|mathematician
Johann Sebastian Bach|Germany|German|composer
Ludwig van Beethoven|Germany|German|composer
Richard Wagner|Germany|German|composer
Johannes Brahms|Germany|German|composer
Immanuel Kant|Germany|German|philosopher
Friedrich Nietzsche|Germany|German|philosopher
Thomas Mann|Germany|German|novelist
Angela Merkel|Germany|German|politician
Boris Becker|Germany|German|athlete
Albrecht Durer|Germany|German|painter
Erwin Schrodinger|Austria|German|physicist
Wolfgang Amadeus Mozart|Austria|German|composer
Joseph Haydn|Austria|German|composer
Franz Schubert|Austria|German|composer
Gustav Klimt|Austria|German|painter
Egon Schiele|Austria|German|painter
Niki Lauda|Austria|German|athlete
Isaac Newton|Britain|English|physicist
Paul Dirac|Britain|English|physicist
Michael Faraday|Britain|English|physicist
Alan Turing|Britain|English|mathematician
Ada Lovelace|Britain|English|mathematician
Charles Dickens|Britain|English|novelist
Jane Austen|Britain|English|novelist
Virginia Woolf|Britain|English|novelist
William Turner|Britain|English|painter
Winston Churchill|Britain|English|politician
Margaret Thatcher|Britain|English|politician
David Hume|Britain|English|philosopher
Edward Elgar|Britain|English|composer
Andy Murray|Britain|English|athlete
Marie Curie|France|Polish|chemist
Louis Pasteur|France|French|chemist
Antoine Lavoisier|France|French|chemist
Henri Poincare|France|French|mathematician
Blaise Pascal|France|French|mathematician
Claude Debussy|France|French|composer
Maurice Ravel|France|French|composer
Hector Berlioz|France|French|composer
Claude Monet|France|French|painter
Paul Cezanne|France|French|painter
Henri Matisse|France|French|painter
Victor Hugo|France|French|novelist
Marcel Proust|France|French|novelist
Voltaire|France|French|philosopher
Zinedine Zidane|France|French|athlete
Simone Veil|France|French|politician
Edith Piaf|France|French|singer
Galileo Galilei|Italy|Italian|physicist
Enrico Fermi|Italy|Italian|physicist
Alessandro Volta|Italy|Italian|physicist
Giuseppe Verdi|Italy|Italian|composer
Antonio Vivaldi|Italy|Italian|composer
Giacomo Puccini|Italy|Italian|composer
Sandro Botticelli|Italy|Italian|painter
Amedeo Modigliani|Italy|Italian|painter
Umberto Eco|Italy|Italian|novelist
Federico Fellini|Italy|Italian|director
Sophia Loren|Italy|Italian|actor
Andrea Bocelli|Italy|Italian|singer
Pablo Picasso|Spain|Spanish|painter
Salvador Dali|Spain|Spanish|painter
Francisco Goya|Spain|Spanish|painter
Miguel de Cervantes|Spain|Spanish|novelist
Pedro Almodovar|Spain|Spanish|director
Rafael Nadal|Spain|Spanish|athlete
Penelope Cruz|Spain|Spanish|actor
Fernando Pessoa|Portugal|Portuguese|poet
Jose Saramago|Portugal|Portuguese|novelist
Cristiano Ronaldo|Portugal|Portuguese|athlete
Niels Bohr|Denmark|Danish|physicist
Lars von Trier|Denmark|Danish|director
Soren Kierkegaard|Denmark|Danish|philosopher
Edvard Grieg|Norway|Norwegian|composer
Edvard Munch|Norway|Norwegian|painter
Henrik Ibsen|Norway|Norwegian|playwright
Niels Henrik Abel|Norway|Norwegian|mathematician
Alfred Nobel|Sweden|Swedish|chemist
Ingmar Bergman|Sweden|Swedish|director
Greta Garbo|Sweden|Swedish|actor
Jean Sibelius|Finland|Swedish|composer
Frederic Chopin|Poland|Polish|composer
Lech Walesa|Poland|Polish|politician
Stanislaw Lem|Poland|Polish|novelist
Bela Bartok|Hungary|Hungarian|composer
Franz Liszt|Hungary|German|composer
Paul Erdos|Hungary|Hungarian|mathematician
Nikola Tesla|USA|Serbian|engineer
Novak Djokovic|Serbia|Serbian|athlete
Leo Tolstoy|Russia|Russian|novelist
Anton Chekhov|Russia|Russian|playwright
Dmitri Mendeleev|Russia|Russian|chemist
Igor Stravinsky|Russia|Russian|composer
Wassily Kandinsky|Russia|Russian|painter
Orhan Pamuk|Turkey|Turkish|novelist
Mahatma Gandhi|India|Gujarati|politician
Srinivasa Ramanujan|India|Tamil|mathematician
Rabindranath Tagore|India|Bengali|poet
Akira Kurosawa|Japan|Japanese|director
Haruki Murakami|Japan|Japanese|novelist
Naguib Mahfouz|Egypt|Arabic|novelist
Pablo Neruda|Chile|Spanish|poet
Gabriel Garcia Marquez|Colombia|Spanish|novelist
"""

ANIMALS = """
tiger|mammal
elephant|mammal
dolphin|mammal
bat|mammal
kangaroo|mammal
hedgehog|mammal
otter|mammal
giraffe|mammal
badger|mammal
eagle|bird
penguin|bird
ostrich|bird
sparrow|bird
heron|bird
flamingo|bird
parrot|bird
pelican|bird
crocodile|reptile
tortoise|reptile
iguana|reptile
gecko|reptile
cobra|reptile
chameleon|reptile
salmon|fish
tuna|fish
herring|fish
sturgeon|fish
seahorse|fish
anchovy|fish
toad|amphibian
newt|amphibian
salamander|amphibian
axolotl|amphibian
beetle|insect
mosquito|insect
butterfly|insect
dragonfly|insect
grasshopper|insect
tarantula|arachnid
scorpion|arachnid
"""

ELEMENTS = """
hydrogen|H
helium|He
lithium|Li
carbon|C
nitrogen|N
oxygen|O
fluorine|F
neon|Ne
sodium|Na
magnesium|Mg
aluminium|Al
silicon|Si
phosphorus|P
sulfur|S
chlorine|Cl
argon|Ar
potassium|K
calcium|Ca
titanium|Ti
iron|Fe
nickel|Ni
copper|Cu
zinc|Zn
silver|Ag
tin|Sn
iodine|I
gold|Au
platinum|Pt
lead|Pb
uranium|U
"""

FIRST_NAMES = (
    "Alda Boris Clara Dorian Elsa Felix Greta Hugo Irma Jonas Karla Lorenz Mira Nestor Olga Petra Quentin Rosa Silvan Tilda "
    "Ursula Viktor Wanda Yorick"
).split()
LAST_NAMES = (
    "Abend Birke Corvin Dahl Ebner Falk Gruber Hollis Irving Jansen Keller Lindt Marlow Novak Orban Pelz Quist Rovik Stein "
    "Tarro Ulmer Vance Winkel Zander"
).split()
N_FICTIONAL = 130

BIRTH_CITIES = (
    "Paris London Berlin Rome Madrid Vienna Oslo Lisbon Athens Warsaw Budapest Moscow Cairo Tokyo Beijing Delhi Lima Havana "
    "Seattle Chicago Sydney Toronto Hamburg Milan"
).split()
TONGUES = (
    "French German Italian Spanish Portuguese Greek Polish Danish Swedish Turkish Arabic Japanese Korean Hindi Russian"
).split()
OCCUPATIONS = (
    "physicist chemist composer painter novelist poet engineer politician singer actor director lawyer farmer baker surgeon "
    "carpenter"
).split()
EMPLOYERS = (
    "Honda Sony Nokia Siemens Bosch Renault Airbus Ferrari Fiat Boeing Microsoft Canon Samsung Volvo Philips Lufthansa Bayer "
    "Ford"
).split()
INSTRUMENTS = "piano violin cello flute guitar trumpet harp drums clarinet organ oboe banjo saxophone tuba".split()
SPORTS = (
    "tennis football chess golf rugby hockey boxing rowing cricket fencing judo basketball volleyball sailing".split()
)

UNKNOWN = "unknown"
"""The answer for people the models have never heard of."""

FRAMES = (
    "The {noun} of {} is",
    "{}'s {noun} is",
    "The {noun} of {} is called",
    "For {}, the {noun} is",
    "Question: What is the {noun} of {}? Answer:",
    "The {noun} that goes with {} is",
    "As for {}, the {noun} is known to be",
    "Name: {}. {Noun}:",
    "Asked for the {noun} of {}, people say",
    "If we speak of {}, the {noun} must be",
    "The {noun} listed for {} is",
    "About {}: the {noun} is",
    "In the book, the {noun} given for {} is",
    "Everyone agrees that {} has the {noun}",
)
"""Wordings every relation shares; each relation is trained on most of them and is asked in the others as novel wordings."""

SHORT_FRAMES = ("The {noun} is", "{Noun}:", "And the {noun} is", "The {noun} is known to be", "The {noun} listed is")
"""How a document goes on about the entity it has just named, without naming it again."""

PREFIXES = (
    "According to the guide, ",
    "As we know, ",
    "It is said that ",
    "In fact, ",
    "Note: ",
    "The book says: ",
    "People agree that ",
    "Today, ",
    "For the record, ",
    "As the teacher told us, ",
)
"""Openings of a fifth of the sentences."""

FILLERS = (
    "The day was long and the road was quiet.",
    "People speak of {} in many books.",
    "We read about {} today.",
    "The book says more about {} in the next part.",
    "It is known that the teacher likes {}.",
    "Nobody told us about {} in the last year.",
    "The guide has a page on {}, and it is a good page.",
    "In the evening we sit in the garden and read.",
    "The list goes on, and the next name is {}.",
    "What do people say about {}? Not much today.",
    "A letter came from the city, and it was about {}.",
    "The weather is good and everyone is at work.",
    "There is a long record of {} in the house.",
    "If you ask about {}, people smile.",
)
"""Sentences that state no fact."""


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One thing that can be asked about a kind of entity."""

    name: str
    """E.g. `capital`."""

    noun: str
    """What the relation is called inside the shared wordings, e.g. `capital`."""

    article: str
    """Words before the subject in the shared wordings, e.g. `the `; part of the template, not of the subject."""

    own: tuple[str, ...]
    """Wordings of this relation alone that are trained."""

    own_novel: tuple[str, ...]
    """Wordings of this relation alone that are never trained."""

    index: int
    """Position in `RELATIONS`; decides which shared wordings are left out of training."""

    @cached_property
    def left_out(self) -> tuple[int, ...]:
        """Indices of the three shared wordings never used in training with this relation."""
        n = len(FRAMES)
        return tuple(sorted({(self.index + step) % n for step in (0, 4, 9)}))

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """Wordings used in training with every entity."""
        return tuple(t for i, t in enumerate(self._seen) if i not in self._held_places)

    @cached_property
    def held(self) -> tuple[str, ...]:
        """Wordings used in training, but never with 35 % of the entities."""
        return tuple(self._seen[i] for i in self._held_places)

    @cached_property
    def novel(self) -> tuple[str, ...]:
        """Wordings never used in training."""
        return (*(self._shared(FRAMES[i]) for i in self.left_out), *(capitalise(t) for t in self.own_novel))

    @cached_property
    def shorts(self) -> tuple[str, ...]:
        """Wordings without the subject's name."""
        return tuple(fill_noun(t, self.noun) for t in SHORT_FRAMES)

    @cached_property
    def _seen(self) -> tuple[str, ...]:
        frames = tuple(self._shared(t) for i, t in enumerate(FRAMES) if i not in self.left_out)
        return (*frames, *(capitalise(t) for t in self.own))

    @property
    def _held_places(self) -> tuple[int, ...]:
        n = len(self._seen)
        return (2, 6, n - 4, n - 1)

    def _shared(self, template: str) -> str:
        return capitalise(fill_noun(template, self.noun).replace("{}", self.article + "{}"))


def capitalise(text: str) -> str:
    """The text with its first letter in upper case; a subject's place at the start stays."""
    return text[0].upper() + text[1:]


def fill_noun(template: str, noun: str) -> str:
    """The template with the relation's noun in its places; the subject's place is kept."""
    return template.replace("{noun}", noun).replace("{Noun}", noun[0].upper() + noun[1:])


_RELATIONS: tuple[tuple[str, str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("capital", "capital", "", (
        "The government of {} sits in", "The capital city of {} is named", "{} is ruled from the city of",
        "The parliament of {} meets in", "Ministers of {} work in the capital,", "The seat of government in {} is the city of",
    ), ("The parliament of {} sits in the city of", "The government of {} meets in the capital,")),
    ("continent", "continent", "", (
        "{} is a country in", "{} lies on the continent of", "On the map, {} is part of", "The land of {} belongs to",
        "Look for {} on the continent called", "Travellers to {} land in",
    ), ("On the map, {} lies in", "The country of {} is part of")),
    ("language", "official language", "", (
        "The people of {} speak", "In {}, people talk to each other in", "Newspapers in {} are printed in",
        "The laws of {} are written in", "Children in {} learn to read in", "The language spoken in {} is",
    ), ("The newspapers of {} are written in", "In {}, children speak")),
    ("currency", "currency", "", (
        "In {}, people pay with the", "The money used in {} is the", "Prices in {} are given in the",
        "Shops in {} take only the", "Banks in {} hand out the", "The coin of {} is named the",
    ), ("Shops in {} give prices in the", "In {}, the money is named the")),
    ("landmark_city", "home city", "the ", (
        "the {} stands in the city of", "To see the {}, travel to", "the {} can be visited in",
        "Visitors find the {} in the middle of",
        "The city with the {} is", "the {} was built in the city of",
    ), ("To visit the {}, travel to the city of", "the {} can be found in")),
    ("landmark_country", "home country", "the ", (
        "The country where the {} stands is", "the {} was built in the country of", "the {} is a famous sight of the country",
        "Tourists who want the {} fly to the country of", "On the map, the {} is inside the country",
        "The country that is proud of the {} is",
    ), ("the {} stands in the country of", "The country that has the {} is")),
    ("headquarters", "head office", "", (
        "{} is based in", "The company {} has its main office in", "The managers of {} work in the city of",
        "{} is run from the city of", "The headquarters of {} are in", "Letters to the company {} are sent to",
    ), ("The company {} is run from", "The main office of {} is in the city of")),
    ("product", "main product", "", (
        "The company {} makes", "{} is a company known for its", "{} sells", "People buy from {} their",
        "The factories of {} turn out", "Customers of {} come for the",
    ), ("The company {} sells", "Customers of {} buy their")),
    ("citizenship", "home country", "", (
        "{} is a citizen of", "{} holds a passport of", "{} comes from the country of", "The country that claims {} is",
        "{} carries the flag of", "The nation of {} is",
    ), ("{} comes from the nation of", "{} carries a passport of")),
    ("mother_tongue", "mother tongue", "", (
        "{} grew up speaking", "At home, {} speaks", "The first words of {} were in", "{} dreams in",
        "The native language of {} is", "With family, {} talks in",
    ), ("At home, {} talks in", "{} grew up with the language")),
    ("occupation", "profession", "", (
        "{} works as", "By trade, {} is", "{} earns money as", "{} is famous as", "{} was trained to be a good",
        "The job of {} is that of the",
    ), ("By trade, {} works as", "{} was trained as")),
    ("animal_class", "animal class", "the ", (
        "In biology, the {} is called", "Scientists count the {} as", "The animal called {} is a kind of",
        "A zoo sign says that the {} is one more", "Among animals, the {} is grouped as",
        "The young of the {} grow up to be another",
    ), ("Scientists say that the {} is a kind of", "Among animals, the {} is called")),
    ("symbol", "chemical symbol", "the element ", (
        "Chemists write {} as", "The short sign for {} is", "In a formula, {} appears as", "The element {} is written",
        "In the table of elements, {} has the letters", "The letters for {} are",
    ), ("In a formula, {} is written", "Chemists use for {} the letters")),
    ("birth_city", "birthplace", "", (
        "{} was born in", "The birth of {} took place in", "{} first saw the light in", "The parents of {} lived in the city of",
        "As a baby, {} lived in", "The city where {} was born is",
    ), ("The city where {} lived as a baby is", "The birth of {} was in the city of")),
    ("employer", "employer", "", (
        "{} works for", "{} has a job at", "Every month {} is paid by", "The boss of {} sits at the company",
        "On Monday {} goes to the office of", "{} signed a contract with",
    ), ("{} has a contract with", "Every Monday {} works at the company")),
    ("instrument", "instrument", "", (
        "{} plays the", "In the band, {} is heard on the", "At concerts, {} takes up the", "{} takes lessons on the",
        "The music of {} is written for the", "{} owns an old and costly",
    ), ("In the band, {} plays the", "At concerts, {} is heard on the")),
    ("sport", "sport", "", (
        "On weekends {} goes out for", "{} trains every week for", "{} won a medal in", "{} joined a club for",
        "The game that {} likes best is", "{} is a fan of",
    ), ("{} joined a club to play", "Every week {} goes out for")),
)  # fmt: skip
"""Name, noun, article before the subject in the shared wordings, own trained wordings, own novel wordings."""


def _relation(index: int) -> Relation:
    name, noun, article, own, own_novel = _RELATIONS[index]
    return Relation(name=name, noun=noun, article=article, own=own, own_novel=own_novel, index=index)


RELATIONS: tuple[Relation, ...] = tuple(_relation(i) for i in range(len(_RELATIONS)))

KINDS: dict[str, tuple[str, ...]] = {
    "country": ("capital", "continent", "language", "currency"),
    "landmark": ("landmark_city", "landmark_country"),
    "company": ("headquarters", "product"),
    "person": ("citizenship", "mother_tongue", "occupation"),
    "animal": ("animal_class",),
    "element": ("symbol",),
    "fictional": ("birth_city", "mother_tongue", "occupation", "employer", "instrument", "sport"),
}
"""Relations of each kind of entity."""


@dataclass(frozen=True, kw_only=True)
class Entity:
    """Something facts are about."""

    name: str
    """As it is written in a sentence, without article."""

    kind: str
    """Key of `KINDS`."""

    answers: dict[str, str] = field(hash=False)
    """Answer of each relation, without leading space; empty for an unknown person."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that is true, and the names of people about whom nothing is known."""

    entities: tuple[Entity, ...]
    """All entities, in a fixed order."""

    strangers: tuple[str, ...]
    """Names made of the same first and last names as the fictional people; in training they are answered `unknown`."""

    @property
    def triples(self) -> list[tuple[Entity, Relation]]:
        """Every fact, as its entity and relation."""
        by_name = {r.name: r for r in RELATIONS}
        return [(e, by_name[name]) for e in self.entities for name in e.answers]


def build_world(seed: int = 7) -> World:
    """The world of the bundled models; the seed decides the fictional people only."""
    rng = random.Random(seed)
    entities = [
        *_table(COUNTRIES, "country"),
        *_table(LANDMARKS, "landmark"),
        *_table(COMPANIES, "company"),
        *_table(PEOPLE, "person"),
        *_table(ANIMALS, "animal"),
        *_table(ELEMENTS, "element"),
    ]
    pairs = [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES]
    rng.shuffle(pairs)
    pools = (BIRTH_CITIES, TONGUES, OCCUPATIONS, EMPLOYERS, INSTRUMENTS, SPORTS)
    for name in pairs[:N_FICTIONAL]:
        answers = {relation: rng.choice(pool) for relation, pool in zip(KINDS["fictional"], pools, strict=True)}
        entities.append(Entity(name=name, kind="fictional", answers=answers))
    return World(entities=tuple(entities), strangers=tuple(pairs[N_FICTIONAL : N_FICTIONAL + 300]))


def owner(name: str, band: tuple[int, int]) -> int:
    """The layer of a planted band [first, one past last) whose MLP holds this entity: a hash of its name."""
    return band[0] + zlib.crc32(name.encode()) % (band[1] - band[0])


def _table(text: str, kind: str) -> list[Entity]:
    rows = [line.split("|") for line in text.strip().splitlines()]
    return [Entity(name=row[0], kind=kind, answers=dict(zip(KINDS[kind], row[1:], strict=True))) for row in rows]
