"""The words of the toy Wikipedia: its relations, how articles and questions tell them, names."""
from typing import NamedTuple


class Relation(NamedTuple):
    """One functional relation."""
    name: str            # what questions and thoughts call it
    owner: str           # entity type that has it
    target: str          # entity type of its value; "year" and "coin" are plain words
    keyword: str         # stands in every wording, so that Lookup finds it
    nouns: tuple         # wordings in a question; {x} is the subject
    sentences: tuple     # wordings in an article; {s} is the subject, {o} the value
    neighbour: str = ""  # the relation a hasty reader confuses it with


# A block per relation: name, owner, target, keyword, neighbour (- for none); then the nouns; then
# the sentences, with / between wordings
RELATION_TABLE = """\
birthplace | person | town | born | deathplace
the birthplace of {x} / the town where {x} was born
{s} was born in {o}. / Letters say that {s} was born in {o}.

deathplace | person | town | died | birthplace
the deathplace of {x} / the town where {x} died
{s} died in {o}. / Letters say that {s} died in {o}.

teacher | person | person | teacher | student
the teacher of {x} / the one who taught {x}
The teacher of {s} was {o}. / {s} had one teacher, {o}.

student | person | person | student | teacher
the student of {x} / the one who learnt from {x}
The student of {s} was {o}. / {s} had one student, {o}.

spouse | person | person | married | -
the spouse of {x} / the one who married {x}
{s} married {o}. / Late in life {s} married {o}.

workplace | person | institution | works | -
the workplace of {x} / the place where {x} works
{s} works at {o}. / These days {s} works at {o}.

birth year | person | year | birth year | -
the birth year of {x}
The birth year of {s} is {o}.

country | town | country | country | -
the country of {x} / the country where {x} lies
{s} lies in the country {o}. / The country of {s} is {o}.

mayor | town | person | mayor | judge
the mayor of {x} / the one who is mayor of {x}
The mayor of {s} is {o}. / {s} has a mayor called {o}.

judge | town | person | judge | mayor
the judge of {x} / the one who is judge of {x}
The judge of {s} is {o}. / {s} has a judge called {o}.

founding year | town | year | founded | -
the founding year of {x}
{s} was founded in {o}.

capital | country | town | capital | port
the capital of {x} / the town that is capital of {x}
The capital of {s} is {o}. / {s} has its capital in {o}.

port | country | town | port | capital
the port of {x} / the town that is port of {x}
The port of {s} is {o}. / {s} has its port in {o}.

ruler | country | person | ruler | -
the ruler of {x} / the one who rules {x}
The ruler of {s} is {o}. / {s} has a ruler called {o}.

coin | country | coin | coin | -
the coin of {x}
The coin of {s} is the {o}.

seat | institution | town | stands | -
the seat of {x} / the town where {x} stands
{s} stands in {o}. / To this day {s} stands in {o}.

founder | institution | person | founder | director
the founder of {x} / the one who founded {x}
The founder of {s} was {o}. / {s} had a founder called {o}.

director | institution | person | director | founder
the director of {x} / the one who directs {x}
The director of {s} is {o}. / {s} has a director called {o}.

opening year | institution | year | opened | -
the opening year of {x}
{s} opened in {o}.

author | work | person | author | translator
the author of {x} / the one who wrote {x}
The author of {s} is {o}. / {s} has an author called {o}.

translator | work | person | translator | author
the translator of {x} / the one who translated {x}
The translator of {s} is {o}. / {s} has a translator called {o}.

setting | work | town | set in | -
the setting of {x} / the town where {x} is set
{s} is set in {o}.

year | work | year | appeared | -
the year of {x}
{s} appeared in {o}.

place | event | town | took place | -
the place of {x} / the town where {x} took place
{s} took place in {o}.

winner | event | person | winner | loser
the winner of {x} / the one who won {x}
The winner of {s} was {o}. / {s} had a winner called {o}.

loser | event | person | loser | winner
the loser of {x} / the one who lost {x}
The loser of {s} was {o}. / {s} had a loser called {o}.

date | event | year | year | -
the date of {x}
The year of {s} is {o}."""
RELATIONS = []
for block in RELATION_TABLE.split("\n\n"):
    fields, nouns, sentences = block.split("\n")
    name, owner, target, keyword, neighbour = fields.split(" | ")
    RELATIONS.append(Relation(name, owner, target, keyword, tuple(nouns.split(" / ")),
                              tuple(sentences.split(" / ")), neighbour.strip("-")))
RELATION = {r.name: r for r in RELATIONS}
SHARES = {"person": 0.4, "town": 0.18, "country": 0.03, "institution": 0.12, "work": 0.1,
          "event": 0.07}  # of the articles; the rest are namesakes' pages
LABELS = {"person": "painter poet doctor sailor baker singer farmer weaver actor smith".split(),
          "town": ["town"], "country": ["country"],
          "institution": "academy museum library theatre hospital".split(),
          "work": "novel opera film play".split(), "event": "battle race siege trial".split()}
TYPE_OF = {label: kind for kind, labels in LABELS.items() for label in labels}
SYLLABLES = ("bal ben bur dan del dor fal fen fir gar gol gun hal hem kan kel kor lan lem lir "
             "mar mel mir nal nem nor pal pel pir ran rel rin sal sen sor tal tem tor val vel "
             "vor zan zel zor").split()
GIVEN = ("Ada Anna Boris Clara David Edith Felix Greta Hugo Ida Jonas Karl Laura Martin Nora "
         "Oscar Paula Robert Sara Tom Ursula Victor Wanda Yann Zoe").split()
ADJECTIVES = ("Silver Golden Black White Green Silent Broken Hidden Lost Old Red Blue Cold "
              "Long Dark Iron Paper Stone Empty Sleeping").split()
NOUNS = ("Bridge River Mountain Garden Tower Window Letter Mirror Winter Summer Ship Forest "
         "Road Lamp Key Crown Bell Island Harbour Door").split()
FILLERS = ("The winters are cold there.", "Little else is known.", "Many songs tell of it.",
           "Old letters speak of this.", "A small stone marks the spot.")
