"""Sentences and the JSON that they say: a task made from a seed, as large as wanted, with one right answer each.

    "On 3 March 2021, Amara Okonkwo ordered 14 lamps from Lisbon."
    {"name":"Amara Okonkwo","city":"Lisbon","quantity":14,"date":"2021-03-03"}

The name must be copied letter by letter, the date must be rewritten, the number must lose its quotes. A model of
135M parameters learns the form in some twenty steps; what is hard is to copy a name that it has never met.

What is held out: first names, last names and sentence shapes are each divided by the seed before anything is
written. No first or last name of a test sentence occurs in any training sentence, and no test sentence has the
shape of one in training. Cities, things, numbers and the ways to write a date may occur in both.

Half of the training names are blends ("Amara" + "Leonid" → "Amarnid"): a model that sees a few hundred names again and
again learns the names; one that sees new ones all the time learns to copy. Test names are all real.
"""

import json
import random
from dataclasses import dataclass
from datetime import date, timedelta

INSTRUCTION = "Give name, city, quantity, date as JSON."
KEYS = ("name", "city", "quantity", "date")


@dataclass(frozen=True)
class Example:
    """One sentence and what it says."""

    sentence: str
    name: str
    city: str
    quantity: int
    date: str  # YYYY-MM-DD
    shape: str  # the sentence before its blanks were filled in

    @property
    def answer(self) -> str:
        """The JSON text that a model should give, to the letter."""
        record = {key: getattr(self, key) for key in KEYS}
        return json.dumps(record, ensure_ascii=False, separators=(",", ":"))  # spaces would be a sixth of its tokens

    @property
    def messages(self) -> list[dict[str, str]]:
        """What the model is asked, as a chat."""
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": self.sentence}]


@dataclass(frozen=True)
class Extraction:
    """A training set and a test set that share no first name, no last name and no sentence shape."""

    train: list[Example]
    test: list[Example]


def make_extraction(seed: int, n_train: int, n_test: int) -> Extraction:
    """Write `n_train` and `n_test` sentences, all different, the same for the same seed.

    Raises:
        ValueError: if a count is negative.

    >>> example = make_extraction(seed=0, n_train=1, n_test=1).train[0]
    >>> sorted(json.loads(example.answer)) == sorted(KEYS)
    True
    """
    if n_train < 0 or n_test < 0:
        raise ValueError(f"cannot write n_train={n_train} and n_test={n_test} sentences: counts are 0 or more")
    rng = random.Random(seed)
    first, unseen_first = split(FIRST_NAMES, rng)
    last, unseen_last = split(LAST_NAMES, rng)
    shapes, unseen_shapes = split(SHAPES, rng)
    first, last = first + blends(first, rng), last + blends(last, rng)
    train = write(n_train, random.Random(f"{seed} train"), first, last, shapes)
    test = write(n_test, random.Random(f"{seed} test"), unseen_first, unseen_last, unseen_shapes)
    return Extraction(train, test)


def split(words: list[str], rng: random.Random, test_share: float = 0.2) -> tuple[list[str], list[str]]:
    """Divide `words` at random into those for training and those for the test."""
    shuffled = rng.sample(words, len(words))
    n_test = round(len(words) * test_share)
    return shuffled[n_test:], shuffled[:n_test]


def blends(names: list[str], rng: random.Random) -> list[str]:
    """Make as many new names as there are `names`, each the front of one and the back of another.

    No blend is itself a name of these lists, so none gives away a name of the test.
    """
    real = {*FIRST_NAMES, *LAST_NAMES}
    made: set[str] = set()
    while len(made) < len(names):
        front, back = rng.sample(names, 2)
        blend = front[: rng.randint(2, max(2, len(front) - 1))] + back[-rng.randint(2, 4) :].lower()
        if blend not in real:
            made.add(blend)
    return sorted(made)


def write(n: int, rng: random.Random, first: list[str], last: list[str], shapes: list[str]) -> list[Example]:
    """Write `n` different sentences with these names and shapes."""
    examples: dict[str, Example] = {}
    while len(examples) < n:
        name = f"{rng.choice(first)} {rng.choice(last)}"
        city, quantity, day = rng.choice(CITIES), random_quantity(rng), random_day(rng)
        shape, things, when = rng.choice(shapes), rng.choice(THINGS), rng.choice(spellings(day))
        sentence = shape.format(name=name, city=city, n=quantity, things=things, date=when)
        examples[sentence] = Example(sentence, name, city, quantity, day.isoformat(), shape)
    return list(examples.values())


def random_quantity(rng: random.Random) -> int:
    """Two to four digits most of the time; never 1, so that the things stay plural."""
    return rng.randint(2, 10 ** rng.randint(1, 4) - 1)


def random_day(rng: random.Random) -> date:
    """Any day from 1990 to 2029."""
    return date(1990, 1, 1) + timedelta(days=rng.randrange(40 * 365 + 10))


def spellings(day: date) -> list[str]:
    """The unambiguous ways to write a date; never 03/04/2021, which means two days.

    >>> spellings(date(2021, 3, 1))[:3]
    ['1 March 2021', 'March 1, 2021', '1st March 2021']
    """
    month = MONTHS[day.month - 1]
    ordinal = "th" if 10 <= day.day <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return [
        f"{day.day} {month} {day.year}",
        f"{month} {day.day}, {day.year}",
        f"{day.day}{ordinal} {month} {day.year}",
        f"the {day.day}{ordinal} of {month} {day.year}",
        f"{month[:3]} {day.day}, {day.year}",
        f"{day.day} {month[:3]} {day.year}",
        day.isoformat(),
    ]


def words(text: str, separator: str = " ") -> list[str]:
    """The entries of a long list that is written over several lines."""
    return " ".join(text.split()).split(separator)


MONTHS = words("January February March April May June July August September October November December")

SHAPES = [
    "On {date}, {name} ordered {n} {things} from {city}.",
    "{name} ordered {n} {things} on {date} for a shop in {city}.",
    "{name} of {city} bought {n} {things} on {date}.",
    "{n} {things} were sent to {name} in {city} on {date}.",
    "In {city}, {name} sold {n} {things} on {date}.",
    "A parcel with {n} {things} reached {name} in {city} on {date}.",
    "On {date}, {n} {things} left {city} for {name}.",
    "{name}, who lives in {city}, asked for {n} {things} by {date}.",
    "Invoice: {n} {things}, {name}, {city}, {date}.",
    "Please deliver {n} {things} to {name} in {city} on {date}.",
    "The warehouse in {city} packed {n} {things} for {name} on {date}.",
    "{date}: {name} picked up {n} {things} in {city}.",
    "It was {date} when {name} came to {city} with {n} {things}.",
    "From {city}, {name} wrote on {date} that {n} {things} were missing.",
    "{name} returned {n} {things} to the store in {city} on {date}.",
    "According to {name}, {n} {things} arrived in {city} on {date}.",
    "Since {date}, {name} has kept {n} {things} in {city}.",
    "We counted {n} {things} in {city} on {date}, and {name} signed the list.",
    "The {n} {things} that {name} needs in {city} are due on {date}.",
    "Customer {name} from {city} paid for {n} {things} on {date}.",
    "{city}, {date}. Received from {name}: {n} {things}.",
    "Did {name} really bring {n} {things} to {city} on {date}?",
    "By {date}, {name} had repaired {n} {things} at the workshop in {city}.",
    "{name} will present {n} {things} at the fair in {city} on {date}.",
    "A customer called {name} reserved {n} {things} in {city} on {date}.",
    "On {date} the museum in {city} lent {n} {things} to {name}.",
    "Thanks to {name}, the school in {city} got {n} {things} on {date}.",
    "Order confirmed: {name} gets {n} {things} in {city} on {date}.",
    "At the market in {city}, {name} found {n} {things} on {date}.",
    "{name} insured {n} {things} with an office in {city} on {date}.",
    "Nobody in {city} knew that {name} had hidden {n} {things} there on {date}.",
    "The courier took {n} {things} from {name} on {date} and drove to {city}.",
    "After the sale of {date}, {name} owned {n} {things} in {city}.",
    "{n} {things} for {name}: pick-up in {city}, {date}.",
    "To {name}, {city}: your {n} {things} were shipped on {date}.",
    "{name} donated {n} {things} to a library in {city} on {date}.",
    "Police in {city} gave {n} {things} back to {name} on {date}.",
    "On {date} in {city}, a record was set by {name} with {n} {things}.",
    "Records show that {name} exported {n} {things} from {city} on {date}.",
    "When {name} moved to {city} on {date}, {n} {things} came along.",
    "For the exhibition in {city}, {name} built {n} {things} until {date}.",
    "Yesterday's note, dated {date}, says that {name} left {n} {things} in {city}.",
    "My colleague {name} flew to {city} on {date} to inspect {n} {things}.",
    "There were {n} {things} on the table in {city} when {name} arrived on {date}.",
    "{name} and a team in {city} tested {n} {things} on {date}.",
    "Ticket opened on {date} by {name}: {n} {things} broken in {city}.",
    "The bakery in {city} borrowed {n} {things} from {name} on {date}.",
    "In a letter of {date}, {name} offers {n} {things} to the city of {city}.",
    "As of {date}, the branch in {city} holds {n} {things} for {name}.",
    "Delivery note. To: {name}. Place: {city}. Date: {date}. Content: {n} {things}.",
    "{date}, {city}: {name} bought {n} {things}.",
    "{date}. {name} painted {n} {things} for a hotel in {city}.",
    "{date} in {city}: {n} {things}, all made by {name}.",
    "{date} was the day on which {name} lost {n} {things} in {city}.",
    "{date}, says {name}, is when {city} ran out of the {n} {things}.",
    "{date} - {n} {things} - {name} - {city}.",
    "{date}: {n} {things} went from {city} to {name}.",
    "{city}: {name} collected {n} {things} on {date}.",
    "{city} received {n} {things} from {name} on {date}.",
    "{city} is where {name} unloaded {n} {things} on {date}.",
    "{city}, noted on {date}: {n} {things} belong to {name}.",
    "{city} / {date} / {name} / {n} {things}.",
    "{name} / {n} {things} / {city} / {date}.",
    "{name}: {n} {things}, {city}, before {date}.",
    "{name} ({city}) requested {n} {things} on {date}.",
    "{name} left for {city} on {date}, taking {n} {things}.",
    "{name} wants a refund for {n} {things} bought on {date} in {city}.",
    "{name} and no one else cleaned {n} {things} in {city} on {date}.",
    "{name} signed for {n} {things}. Place and day: {city}, {date}.",
    "{n} {things} broke in {city} on {date}, according to a call from {name}.",
    "{n} {things} from {city} are waiting for {name} since {date}.",
    "{n} {things} burned in {city}; {name} reported it on {date}.",
    "{n} {things}, delivered {date}, {city}, attention {name}.",
    "{n} {things} by {name} were shown in {city} until {date}.",
    "About the {n} {things} in {city}: {name} will call on {date}.",
    "All {n} {things} were stolen from {name} on {date} near {city}.",
    "Around {date}, a truck brought {n} {things} to {city}, where {name} waited.",
    "Because of the storm of {date}, {name} could not ship {n} {things} to {city}.",
    "Before {date} there were {n} {things} in {city}, if {name} is right.",
    "Booked for {name}: {n} {things}, from {date}, in {city}.",
    "Dear {name}, the {n} {things} that you chose in {city} arrive on {date}.",
    "Due {date}: {n} {things} to be returned to {name}, {city}.",
    "Each of the {n} {things} that {name} carried to {city} was dated {date}.",
    "Every visitor in {city} admired the {n} {things} of {name} on {date}.",
    "For {name}: {n} {things}. Ready on {date} in {city}.",
    "Hello, this is {name} from {city}; I need {n} {things} before {date}.",
    "How did {n} {things} get from {city} to {name} on {date}?",
    "I saw {name} in {city} on {date}, hauling {n} {things}.",
    "Last seen in {city} on {date}: {name}, with {n} {things}.",
    "Let {name} know that {n} {things} leave {city} on {date}.",
    "Lot {n} {things}, {city}. Sold to {name}, {date}.",
    "Name: {name}. City: {city}. Number: {n} {things}. Day: {date}.",
    "Next to {n} {things} in {city} stood {name}, and it was {date}.",
    "No later than {date}, {city} must send {name} {n} {things}.",
    "Only {n} {things} were left in {city} when {name} called on {date}.",
    "Our driver met {name} in {city} on {date} and unloaded {n} {things}.",
    "Remember: {date}, {city}, {name}, {n} {things}.",
    "The mayor of {city} thanked {name} on {date} for {n} {things}.",
    "Until {date} the {n} {things} of {name} stay in {city}.",
    "Why would {name} buy {n} {things} in {city} on {date}?",
]

THINGS = words(
    """
    lamps chairs tables books tickets bottles boxes candles cameras carpets clocks coats cups desks doors drums
    engines envelopes filters flags forks gloves guitars hammers hats helmets jackets kettles keyboards keys knives
    ladders laptops lenses magnets mirrors mugs needles notebooks paintings pans pencils phones pianos pillows
    plates posters printers pumps radios ropes rugs saws scarves screens seeds shelves shirts shoes shovels sofas
    spoons stamps stools suitcases sweaters tents tiles towels toys tractors trays umbrellas vases violins watches
    wheels windows apples oranges lemons melons onions potatoes carrots pumpkins loaves cakes bicycles batteries
    cables bricks ribbons
    """
)

CITIES = words(
    """
    Lisbon, Porto, Madrid, Seville, Valencia, Bilbao, Paris, Lyon, Marseille, Toulouse, Nantes, Brussels, Antwerp,
    Ghent, Amsterdam, Rotterdam, Utrecht, Berlin, Hamburg, Munich, Cologne, Dresden, Leipzig, Vienna, Graz,
    Salzburg, Zurich, Geneva, Basel, Rome, Milan, Naples, Turin, Palermo, Athens, Thessaloniki, Warsaw, Gdansk,
    Prague, Brno, Budapest, Bucharest, Sofia, Zagreb, Belgrade, Sarajevo, Kyiv, Lviv, Riga, Vilnius, Tallinn,
    Helsinki, Turku, Stockholm, Gothenburg, Oslo, Bergen, Copenhagen, Aarhus, Reykjavik, Dublin, Cork, London,
    Leeds, Bristol, Glasgow, Edinburgh, Cardiff, Istanbul, Ankara, Izmir, Tbilisi, Yerevan, Baku, Tehran, Baghdad,
    Amman, Beirut, Haifa, Cairo, Alexandria, Tunis, Algiers, Casablanca, Rabat, Dakar, Accra, Lagos, Abuja, Nairobi,
    Mombasa, Kampala, Kigali, Lusaka, Harare, Durban, Cape Town, Windhoek, Dubai, Doha, Muscat, Karachi, Lahore,
    Delhi, Mumbai, Chennai, Kolkata, Jaipur, Dhaka, Kathmandu, Colombo, Bangkok, Hanoi, Saigon, Manila, Cebu,
    Jakarta, Bandung, Kuala Lumpur, Singapore, Hong Kong, Shanghai, Beijing, Chengdu, Taipei, Seoul, Busan, Tokyo,
    Osaka, Kyoto, Sapporo, Sydney, Melbourne, Perth, Brisbane, Auckland, Wellington, Honolulu, Vancouver, Calgary,
    Toronto, Montreal, Ottawa, Halifax, Boston, New York, Philadelphia, Baltimore, Chicago, Detroit, Denver,
    Seattle, Portland, San Diego, Los Angeles, Phoenix, Houston, New Orleans, Miami, Atlanta, Havana, Kingston,
    Mexico City, Puebla, Guadalajara, Panama City, Bogota, Medellin, Quito, Lima, Cusco, La Paz, Asuncion,
    Montevideo, Buenos Aires, Rosario, Mendoza, Valparaiso, Recife, Salvador, Brasilia, Rio de Janeiro, Curitiba,
    Manaus
    """,
    separator=", ",
)

FIRST_NAMES = words(
    """
    Aaron Abebe Abigail Adaeze Adam Adebayo Aditi Adriana Agnieszka Ahmed Aiko Aileen Aisha Akira Alain Alba Albert
    Alejandra Aleksander Alessia Alice Alina Aline Alistair Alma Amara Amelia Amina Amir Amit Ana Anahit Anand
    Ananya Anders Andrei Angela Anil Anita Anjali Annika Anouk Antoine Anton Apinya Arash Arjun Armando Arne Arthur
    Arturo Asha Astrid Aurélie Ayesha Aylin Babajide Barbara Bartosz Basma Beatriz Benedikt Benjamin Bernadette
    Bilal Birgit Bjarne Blessing Bogdan Boris Brandon Bridget Bruno Camila Caoimhe Carlos Carmen Caroline Catalina
    Cécile Celeste Chandra Charlotte Chiamaka Chiara Chidi Chinedu Chloe Christoph Ciara Clara Claudio Clement
    Colette Conor Cornelia Cristian Cyrus Dagmar Daisuke Damian Daniela Danilo Daria Darius Deborah Deepak Delphine
    Dennis Destiny Dieter Dimitri Dmitry Dolores Dominik Dorothea Douglas Dragan Duncan Ebba Eduardo Edwin Eero Efua
    Eileen Eirik Ekaterina Elena Eliška Elizabeth Ellen Elodie Elsa Emeka Emilia Emmanuel Enrique Erik Esperanza
    Esther Étienne Eugenia Eva Evelyn Fabian Fadi Farah Farid Fatima Federica Feliks Fernanda Filip Fiona Florence
    Florian Folake Francesca Frederik Freya Gabriela Gareth Gaspard Gavin Genevieve Georgia Gerard Ghada Gianluca
    Gilbert Giorgos Giulia Gizem Gloria Gonzalo Goran Greta Grzegorz Guadalupe Guillaume Gulnara Gunnar Gustavo
    Habib Hadiza Hamza Hana Hannah Harald Haruto Hassan Hector Heidi Helena Henrik Hilda Hiroshi Hoang Hugo Husna
    Ibrahim Ida Ifeoma Ignacio Igor Ikram Ilona Imani Imran Ines Inga Ingrid Irene Irina Isabella Isidora Ismail
    Ivana Iwona Jacek Jacqueline Jakub Jamal Jana Jarmila Jasmine Javier Jelena Jens Jeremy Jerome Jessica Jihye
    Joanna Joaquín Jocelyn Johanna Jonas Jorge Josefina Judith Julien Junko Jürgen Kacper Kaja Kamala Karim Karin
    Kasper Katarzyna Kateryna Kavita Keiko Kenji Kerstin Khadija Khalid Kimberly Kiran Klaus Kofi Konrad Kristina
    Kwabena Kwame Kyoko Lakshmi Lamia Lars Latoya Laura Layla Leandro Leila Leonid Leticia Liam Lidia Liesbeth
    Lilian Linh Linnea Lorenzo Louise Lucas Lucía Ludmila Luis Łukasz Lydia Madeleine Magdalena Mahmoud Maja Makoto
    Malik Mandla Manuela Marcel Marek Margaret Maria Marisol Marta Martin Masha Mateus Mathilde Matteo Maurice Mei
    Melanie Mercedes Mesut Michael Miguel Mikkel Mila Milica Mina Minh Miriam Mirko Mohamed Moira Monique Moses
    Mustafa Nadia Naledi Naomi Natalia Nathan Neha Nia Niamh Nicolas Nikita Nils Nina Njeri Noam Noor Nora Norbert
    Nuria Obinna Octavia Odile Oksana Olga Oliver Oluwaseun Omar Ondřej Oscar Otto Pablo Padma Paloma Paola Parisa
    Patricia Paul Pavel Pedro Peter Petra Philippa Pierre Piotr Pooja Pradeep Priya Quentin Rachel Radka Rafael
    Rahel Raimund Rajesh Ramona Rana Raquel Rashid Ravi Rebecca Renata Reza Ricardo Rita Robert Rocío Rodrigo Roland
    Roman Rosalind Roxana Ruben Rukhsana Ruth Ryo Sabine Sadia Saeed Sakura Salma Samira Samuel Sandeep Sandra
    Sanjay Saoirse Sarah Sebastian Selma Sergei Shabnam Shanti Sheila Shreya Sibusiso Siegfried Sigrid Simone Sindre
    Siobhan Slavica Solveig Søren Sota Stefan Stephanie Sunil Susana Svetlana Sylvie Tadeusz Taiwo Takeshi Tamar
    Tamara Tanvi Tariq Tatiana Tereza Thabo Thandiwe Theodora Theresa Thierry Thomas Thuy Tiago Timothy Tobias
    Tomasz Tomoko Torsten Tova Tristan Tunde Uchenna Ulrike Umar Ursula Usha Valentina Valeria Vanessa Vasili Vera
    Veronika Victor Vijay Viktoria Vincent Violeta Viviana Vladimir Wanda Wanjiru Wassim Wendy Wiktor Wilhelm
    William Winifred Wojciech Xavier Ximena Yael Yannick Yara Yasmin Yevgenia Yitzhak Yolanda Yoshiko Youssef Yuki
    Yuliya Yusuf Yvonne Zahra Zainab Zanele Zdenka Zeynep Zlatan Zoë Zofia Zsófia Zuzana
    """
)

LAST_NAMES = words(
    """
    Abdullahi Abenov Abiodun Abrahamsen Achterberg Adamczyk Adeyemi Afolabi Aguilar Ahlström Akhtar Akintola Alvarez
    Amundsen Anderson Andersson Antonescu Appiah Aquino Arslan Asante Ashworth Aslanyan Atkinson Ávila Aydin
    Baczynski Balogun Banerjee Baptiste Barbieri Barros Bauer Beaumont Becker Bennett Bergström Bernard Bianchi
    Bielak Bjornstad Blackwood Blanchard Boateng Bogdanov Bondarenko Borges Bouchard Bradley Brennan Brodsky Brown
    Bukowski Cabrera Caldwell Calloway Campbell Cardoso Carvalho Castillo Çelik Chakraborty Chambers Chandrasekhar
    Chatterjee Chaudhry Chevalier Chikwanha Christensen Chukwu Clarke Colonna-Conti Contreras Cooper Corrigan Costa
    Crawford Cruickshank Cunningham Czerny Dalgaard Danjuma Davies Delacroix Demir Deschamps Devereux Dhillon Diallo
    Díaz Dimitrov Dlamini Dobrowolski Domingues Donnelly Doyle Drăgan Dubois Dufresne Dumont Dvořák Eberhardt
    Echeverría Edwards Eklund Ekwueme Eliasson Engström Eriksen Escobar Espinoza Evans Fagerlund Falconer Farouk
    Fashola Feldman Fernández Ferreira Fischer Fitzgerald Fleming Fontaine Forsberg Fournier Frankl Fraser Friedrich
    Fujimoto Fukuda Gagnon Galanis Gallagher Garcia Gebreselassie Georgiou Ghosh Gierszewski Giordano Glazunov Gomes
    Gonzalez Goodwin Górski Graham Greco Greenberg Grigoryan Gruber Guerrero Gunnarsson Gupta Gutierrez Gwala Haddad
    Hagen Hakimi Halvorsen Hamasaki Hansen Harrington Hashimoto Hawkins Hayashi Heikkinen Hendriks Hernandez
    Herrmann Hidalgo Hoffmann Holmgren Horváth Hossain Hudson Hughes Huang Huber Hussain Hutchinson Ibarra Iglesias
    Ikeda Ilyin Inoue Iqbal Ishikawa Islam Ivanov Iyer Jackson Jacobsen Jankowski Jansen Jaramillo Jayawardena
    Jensen Jiménez Johansson Jovanović Juarez Juhász Kaczmarek Kamara Kaminski Kapoor Karlsson Kaunda Kavanagh
    Kawasaki Keller Kennedy Khalil Khumalo Kiplagat Kirchner Kiselev Kobayashi Koch Kołodziej Konaté Koroma Koskinen
    Kovalenko Kowalczyk Kozlov Kraus Krishnan Kruger Kubota Kuznetsov Kvist Lachance Lagerkvist Lambert Larsen
    Laurent Lebedev Leclerc Lefebvre Lehmann Lehtonen Leone Levy Lindholm Lombardi Lopez Lovelace Lundqvist
    Macdonald Machado Magnusson Mahlangu Mäkinen Maldonado Malinowski Manning Marchetti Marino Markovic Marshall
    Martinez Matsumoto Mazur Mbeki Mboya McAllister McCarthy McIntyre Medina Mehta Meier Mendes Menon Mercier
    Mészáros Meyer Michalski Mikkelsen Miller Mishra Mitchell Miyazaki Mokoena Molina Montgomery Morales Moreau
    Moretti Morrison Mukherjee Müller Murakami Murphy Mutasa Nagy Naidoo Nakamura Narayan Navarro Ndiaye Nguyen
    Nielsen Nikolaidis Nkosi Nordström Novák Nowak Nwosu Nyberg O'Brien O'Connor O'Sullivan Obi Ochieng Odhiambo
    Ogawa Okafor Okonkwo Okoye Olofsson Oliveira Olszewski Omondi Onyango Orlov Ortega Osei Osman Östberg Owusu
    Oyelaran Özdemir Pacheco Palmer Panagopoulos Papadakis Parker Patel Pavlov Pedersen Pereira Perrin Petrov
    Petrović Pettersson Pham Phillips Pillai Pinto Popescu Potgieter Prescott Quigley Quintero Radcliffe Rahman
    Rakotomalala Ramírez Rasmussen Reddy Reinhardt Renaud Reyes Ribeiro Richter Rivera Roberts Robinson Rodríguez
    Romanov Romero Rossi Rousseau Rutkowski Saito Salazar Salvatore Sanchez Sandoval Santos Sapieha Savchenko
    Schäfer Schmidt Schneider Schröder Schumacher Schwarz Sekibo Sharma Shevchenko Shimizu Siddiqui Sikorski Silva
    Simmons Sinclair Singh Sithole Sivakumar Sjöberg Skovgaard Smirnov Sokolov Sorensen Soto Spencer Srinivasan
    Stavropoulos Steiner Stevenson Stojanović Strand Suárez Sutherland Suzuki Svensson Szabó Szymański Takahashi
    Talbot Tanaka Tavares Taylor Tchaikovsky Tembo Teixeira Thompson Thorsen Tiwari Torres Tóth Traoré Tremblay
    Trujillo Tsegaye Turner Tuominen Uddin Ueda Umarov Urbański Valdez Vandenberg Vargas Vasquez Venkatesan Verma
    Vermeulen Vieira Villanueva Virtanen Vogel Volkov Wagner Walker Wallace Wang Watanabe Watson Weber Weiss
    Whitaker Wieczorek Williams Winkler Wiśniewski Wongsakul Wood Wright Wysocki Yamamoto Yang Yilmaz Yoshida Zając
    Zakharov Zamora Zapata Zdravković Zhang Zieliński Zimmermann Zubair
    """
)
